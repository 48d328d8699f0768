"""A prepared folder of any size for measuring speed: Zipf(1.1) items, full histories, random tokens."""

import json
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.raw import RawDataset, RawItems

__all__ = ["write_synthetic"]

TOKENS = {"text": (32, 128), "image": (16, 128)}
"""Tokens of the default encoders and the width to which `em3 prepare` reduces them."""
ZIPF_EXPONENT = 1.1


def write_synthetic(
    out: Path, *, num_users: int, num_items: int, num_events: int, seed: int = 0, tokens_of: Path | None = None
) -> Path:
    """Write a prepared folder whose items are Zipf distributed, with token arrays of the default encoders' shapes.

    Args:
        out: Folder to make.
        num_users: Users, equally active.
        num_items: Items of the catalogue.
        num_events: Interactions.
        seed: Seed of everything.
        tokens_of: Prepared folder with as many items, whose tokens are linked instead of writing new ones.

    Returns:
        `out`.
    """
    random = np.random.default_rng(seed)
    item = random.zipf(ZIPF_EXPONENT, num_events) % num_items
    names = np.arange(num_items).astype(str)
    empty = np.full(num_items, "")
    raw = RawDataset(
        name="synthetic",
        user_id=random.permutation(np.arange(num_events) % num_users).astype(str),
        item_id=names[item],
        rating=random.integers(0, 2, num_events).astype(np.float32),
        timestamp=np.arange(num_events, dtype=np.int64),
        items=RawItems(names, names, empty, empty, empty),
        image_root=out.parent,
    )
    prepare(raw, out, PrepareOptions(label_threshold=None, text_encoder="none", image_encoder="none"))
    meta = json.loads((out / "meta.json").read_text())
    if tokens_of is not None:
        (out / "tokens").symlink_to(tokens_of.resolve() / "tokens")
    for name, (count, dim) in TOKENS.items():
        if tokens_of is None:
            _write_tokens(out / "tokens" / name, num_items + 1, count, dim, random)
        meta["modalities"][name] = {
            "encoder": "random", "source": "random", "dim": dim, "max_tokens": count,
            "present": num_items, "missing": 0, "broken": 0,
        }  # fmt: skip
    (out / "meta.json").write_text(json.dumps(meta))
    return out


def _write_tokens(folder: Path, rows: int, count: int, dim: int, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    tokens_NTD = open_memmap(folder / "tokens.npy", mode="w+", dtype=np.float16, shape=(rows, count, dim))
    block = random.standard_normal((256, count, dim)).astype(np.float16)
    for start in range(0, rows, len(block)):
        tokens_NTD[start : start + len(block)] = block[: rows - start]
    tokens_NTD.flush()
    # As measured on MovieLens: texts fill about three quarters of their tokens, images all.
    lengths = random.integers(count // 2, count + 1, rows) if count == TOKENS["text"][0] else np.full(rows, count)
    np.save(folder / "lengths.npy", lengths.astype(np.int32))
    np.save(folder / "present.npy", np.arange(rows) > 0)
    (folder / "meta.json").write_text(
        json.dumps({"encoder": "random", "source": "random", "dim": dim, "max_tokens": count})
    )
