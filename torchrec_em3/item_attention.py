"""What the queries of a run's content tower attend to in a few items.

Shape letters: U items, Q queries, T tokens of a modality.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torchrec_em3.datasets.encoder_record import rebuild_encoder
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError
from torchrec_em3.trained_run import TrainedRun

__all__ = ["AUTO", "ItemAttention", "choose_items", "read_attention"]

AUTO = "auto"
EXAMPLES = 3
"""Items that "auto" takes of those trained most, and as many of those never trained on."""
SEED = 0


@dataclass(frozen=True)
class ItemAttention:
    """One item and where the tower looks.

    Attributes:
        item: Catalogue row.
        weights: Attention of each query to each token that the item has, float32 [Q, T] by modality; modalities that
            the item lacks are left out. What is missing to a sum of 1 over all modalities goes to the queries.
        pieces: Words or wordpieces of the text tokens; empty where the text encoder does not tell.
    """

    item: int
    weights: Mapping[str, NDArray[np.float32]]
    pieces: Sequence[str]


def choose_items(data: PreparedData, wanted: str) -> list[int]:
    """Return the catalogue rows of `wanted`, raw ids joined by commas; or with "auto" some items of the test split.

    Those are the ones with a picture that were trained on most, and a seeded few never trained on.

    Raises:
        ConfigError: If an id is not in the catalogue.
    """
    if wanted != AUTO:
        raw_ids = data.items["raw_id"].to_pylist()
        rows = {raw_id: row for row, raw_id in enumerate(raw_ids) if row}
        items = [item.strip() for item in wanted.split(",")]
        unknown = [item for item in items if item not in rows]
        if unknown:
            raise ConfigError(
                f"--attention: no item has the id '{unknown[0]}' in {data.folder}; give raw ids of items.parquet"
            )
        return [rows[item] for item in items]
    tested = np.unique(data.split_rows("test")["item"])
    pictured = np.array([bool(name) for name in data.items["image"].to_pylist()])
    tested = tested[pictured[tested]] if pictured[tested].any() else tested
    count = data.item_train_count[tested]
    often = tested[np.argsort(-count, kind="stable")][:EXAMPLES]
    never = np.random.default_rng(SEED).permutation(tested[count == 0])[:EXAMPLES]
    return list(dict.fromkeys([*often.tolist(), *np.sort(never).tolist()]))


@torch.no_grad()
def read_attention(trained: TrainedRun, items: Sequence[int]) -> list[ItemAttention]:
    """Return the attention of the tower's queries for each item, from the weights of the run's best checkpoint.

    Args:
        trained: The run; nothing of it changes.
        items: Catalogue rows.

    Raises:
        ConfigError: If the run has no content tower, or one that cannot tell what it attends to.
    """
    content = trained.sharded.model.content
    attend = None if content is None else getattr(content.tower, "token_attention", None)
    if content is None or attend is None:
        name = trained.config.model.content
        raise ConfigError(f"--attention: --model.content {name} has no queries to show; use a run with fusion_qformer")
    item_U = torch.tensor(items, dtype=torch.int64, device=content.projection.weight.device)
    tokens = content.tokens(item_U)
    weights = {name: weight_UQT.float().cpu().numpy() for name, weight_UQT in attend(tokens).items()}
    valid = {name: modality.valid_UT.cpu().numpy() for name, modality in tokens.items()}
    pieces = _pieces(trained.data, items)
    found = []
    for place, item in enumerate(items):
        present = {name: mask_UT[place] for name, mask_UT in valid.items() if mask_UT[place].any()}
        # A tower that pools a modality attends to one token of it, whatever the item has.
        pooled = {name: weights[name].shape[2] != len(mask_T) for name, mask_T in present.items()}
        shown = {
            name: weights[name][place] if pooled[name] else weights[name][place][:, mask_T]
            for name, mask_T in present.items()
        }
        found.append(ItemAttention(item, shown, pieces[place]))
    return found


def _pieces(data: PreparedData, items: Sequence[int]) -> list[list[str]]:
    recorded = data.meta["modalities"].get("text")
    encoder = None if recorded is None else rebuild_encoder("text", recorded)
    split = getattr(encoder, "pieces", None)
    texts = data.items["text"].take(np.asarray(items)).to_pylist()
    return [split(text) if split is not None and text else [] for text in texts]
