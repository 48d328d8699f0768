"""A tiny simulated data set whose items have semantic codes that say which kind of item they are."""

from dataclasses import replace
from pathlib import Path

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.raw import RawCodes
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate

NAME, LEVELS = "quant", 3


def prepare_coded(folder: Path, *, encoders: bool, split: str = "temporal") -> Path:
    """Prepare 150 items, every seventh without codes; the first level is the category, the others tell items apart.

    As in reviews and sequence files, users have no side features.
    """
    raw = simulate(SimulatedOptions(num_items=150, num_users=60, num_interactions=3000, seed=0), folder / "raw")
    kinds = sorted(set(raw.items.category.tolist()))
    codes = {
        item: (kinds.index(kind), number % 5, number % 11)
        for number, (item, kind) in enumerate(zip(raw.items.item_id.tolist(), raw.items.category.tolist(), strict=True))
        if number % 7
    }
    chosen = {"text_encoder": "tiny_text", "image_encoder": "tiny_image"} if encoders else {}
    options = {"text_encoder": "none", "image_encoder": "none", "label_threshold": None, "split": split} | chosen
    raw = replace(raw, codes={NAME: RawCodes("made", codes)}, user_features={})
    prepare(raw, folder / "data", PrepareOptions(**options))
    return folder / "data"
