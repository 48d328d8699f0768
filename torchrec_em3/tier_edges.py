"""Rows of the validation split that lie on the edge of a similarity tier, where rounding decides what a model counts.

A histogram of cosines jumps where a cosine passes from one tier to the next, so two exact computations of one logit may
differ by far more than rounding. How many rows that can befall is counted here, instead of allowing it everywhere.

Shape letters: B rows of the split, N history positions of some of them, D width.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from torchrec_em3.components.similarity import TIERS
from torchrec_em3.export_tables import CatalogueContent
from torchrec_em3.trained_run import TrainedRun

__all__ = ["rows_at_tier_edges"]

MARGIN = 2e-6
"""Cosines as near as this to an edge may be counted on either side; float32 rounds a cosine to about a tenth of it."""
ROWS_AT_A_TIME = 1024


def rows_at_tier_edges(trained: TrainedRun, content: CatalogueContent | None) -> NDArray[np.bool_]:
    """Return which rows of the validation split have a cosine at an edge; none where the model has no histogram.

    Args:
        trained: The run.
        content: Content of its catalogue; read only for a histogram.
    """
    columns, model = trained.data.split_rows("validation"), trained.sharded.model
    near_B = np.zeros(len(columns["item"]), dtype=np.bool_)
    if model.content is None or model.content.similarity is None or not model.content.similarity.histogram:
        return near_B
    assert content is not None
    first = trained.data.history_offsets[columns["user"]]
    first = np.maximum(first, columns["history_end"] - trained.config.loader.max_history)
    for start in range(0, len(near_B), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        lengths_B = columns["history_end"][part] - first[part]
        batch_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
        offset_N = np.arange(len(batch_N)) - np.repeat(lengths_B.cumsum() - lengths_B, lengths_B)
        history_N = trained.data.history_items[first[part][batch_N] + offset_N]
        at_edge_N = _at_edge(content, columns["item"][part][batch_N], history_N)
        near_B[part][batch_N[at_edge_N]] = True
    return near_B


def _at_edge(
    content: CatalogueContent, target_N: NDArray[np.integer], history_N: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """Return which cosines of valid history items are at an edge between two tiers."""
    assert content.history is not None
    assert content.history.valid_V is not None
    target, history = (torch.from_numpy(np.asarray(rows, dtype=np.int64)) for rows in (target_N, history_N))
    cosine_N = functional.cosine_similarity(
        content.target_ID[target].double(), content.history.rows_VD[history].double(), dim=1
    )
    place_N = (cosine_N + 1.0) * (TIERS / 2)
    edge_N = place_N.round()
    near_N = (place_N - edge_N).abs() <= MARGIN * TIERS / 2
    # Beyond the first and the last edge there is no other tier to be counted in.
    inner_N = (edge_N > 0) & (edge_N < TIERS)
    return (near_N & inner_N & content.history.valid_V[history]).numpy()
