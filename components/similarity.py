"""How alike a candidate's content is to that of each item of a ragged history, as one block for the ranker.

Shape letters: B rows, V distinct history items, N history positions of all rows, D width of the tower's output, T
tiers, W width of the block.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.components.interest import only_valid
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.ragged_attention import ragged_dot_products

__all__ = ["TIERS", "ContentSimilarity", "tier_of"]

STATISTICS = 4
TIERS = 20
"""Of width 0.1 each, over cosines from -1 to 1."""


class ContentSimilarity(nn.Module):
    """Cosines of target and history items, summed up by statistics, by a histogram or by both, and mapped to a block.

    Statistics are the mean, the largest and the last cosine and the share of the positions whose item is valid. The
    histogram holds log(1 + count) of each tier. Rows whose history is empty or holds no valid item have zeros in both.

    Both sides are compared as the tower's output and the bank's rows are, before the projection: that is one space for
    them, while the history's own map to content drifts away from the projection, and it costs no map of the V items.
    The statistics train the target's content; the history items and the counts take no gradient. At width D a position
    costs 2 D multiply-adds with the backward pass, and no [N, D] tensor is stored.

    Source: cosines of target and history as features of the ranker, LEMUR [follow-up]; counts of similarity tiers,
    SimTier [follow-up]; which statistics, tiers and map, and where the gradient goes, are [ours].

    Args:
        kind: What sums the cosines up.
    """

    width: ClassVar[int] = 16
    """W."""

    def __init__(self, kind: Literal["statistics", "histogram", "both"]) -> None:
        super().__init__()
        self.statistics, self.histogram = kind != "histogram", kind != "statistics"
        self.project = nn.Linear(STATISTICS * self.statistics + TIERS * self.histogram, self.width)

    def forward(self, content_BD: Tensor, history: HistoryItems, row_N: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the block [B, W].

        Args:
            content_BD: The tower's output for the target of each row.
            history: The distinct history items; only their rows are read, not the map.
            row_N: Item that each position holds, int64, the positions of one batch row together and oldest first.
            lengths_B: Number of positions of each batch row, int64; sums to N.
        """
        features = self.features(content_BD, history, row_N, lengths_B)
        return functional.silu(self.project(features))

    def features(self, content_BD: Tensor, history: HistoryItems, row_N: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the statistics and then the counts of each row, before the map; see `forward`."""
        history, ragged = only_valid(history, row_N, lengths_B)
        unit_VD = functional.normalize(history.rows_VD.detach(), dim=1)
        cosine_N = ragged_dot_products(functional.normalize(content_BD, dim=1), unit_VD, ragged)
        batch_N = torch.repeat_interleave(ragged.lengths_B, output_size=cosine_N.numel())
        parts = []
        if self.statistics:
            parts.append(_statistics(cosine_N, batch_N, ragged.lengths_B, lengths_B))
        if self.histogram:
            parts.append(_histogram(cosine_N.detach(), batch_N, lengths_B.numel()))
        return torch.cat(parts, dim=1)


def _statistics(cosine_N: Tensor, batch_N: Tensor, count_B: Tensor, positions_B: Tensor) -> Tensor:
    """Return mean, largest and last cosine and the share of the row's positions that are valid, [B, 4]."""
    zero_B = cosine_N.new_zeros(count_B.numel())
    total_B = zero_B.index_add(0, batch_N, cosine_N)
    # segment_reduce would be shorter, but where an item is twice in a history it counts a negative gradient twice.
    largest_B = zero_B.scatter_reduce(0, batch_N, cosine_N, "amax", include_self=False)
    # A row without valid positions finds the zero in front.
    last_B = functional.pad(cosine_N, (1, 0)).index_select(0, count_B.cumsum(0) * (count_B > 0))
    share_B = count_B / positions_B.clamp_min(1)
    return torch.stack([total_B / count_B.clamp_min(1), largest_B, last_B, share_B.to(cosine_N.dtype)], dim=1)


def _histogram(cosine_N: Tensor, batch_N: Tensor, rows: int) -> Tensor:
    """Return log(1 + count) of the cosines in each tier, [B, T]."""
    count_BT = torch.bincount(batch_N * TIERS + tier_of(cosine_N), minlength=rows * TIERS).view(rows, TIERS)
    return count_BT.to(cosine_N.dtype).log1p()


def tier_of(cosine: Tensor) -> Tensor:
    """Return the tier of each cosine, int64, from 0 on."""
    return ((cosine + 1.0) * (TIERS / 2)).long().clamp(0, TIERS - 1)
