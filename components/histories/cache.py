"""History content from the content bank: one cached row an item and a low-rank correction.

Shape letters: V distinct history items, D width of the model, R rank.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from torchrec_em3.components.interfaces import HistoryItems, ItemSource, output_width
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import HISTORIES

__all__ = ["CachedHistory", "CachedHistoryOptions"]


@dataclass(frozen=True, kw_only=True)
class CachedHistoryOptions:
    """Options of the history content `cache`."""

    rank: int = 0
    """Rank of the low-rank correction; 0 leaves it out, which ranked no worse (docs/what-helps.md)."""
    alpha: int = 16
    """Weight of the correction, if there is one: it is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if self.rank < 0:
            raise ConfigError(f"rank of the cache history is {self.rank}, must be >= 0")


@HISTORIES.register("cache", options=CachedHistoryOptions)
class CachedHistory(nn.Module):
    """Content of history items from the bank: P x, or P x + (alpha / rank) B A x where there is a rank.

    P is the target branch's projection at its current value, not trained from here; A and B are. B starts at zero, so
    that a history item starts out as the target branch would see it. An item costs the reading of one row, since the
    map is handed on for the attention to apply where it costs least: so content is affordable over long histories.

    Source: low-rank adaptation of content interest modelling, for its cost over long histories [abstract]; which matrix
    is adapted is not public, so the bank and this form are [ours].

    Args:
        options: See `CachedHistoryOptions`.
        tower: Gives the width of the bank's rows.
        width: D.
    """

    uses_bank: ClassVar[bool] = True

    def __init__(self, options: CachedHistoryOptions, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.rank = options.rank
        if not options.rank:
            return
        self.scale = options.alpha / options.rank
        self.down_RD = nn.Parameter(torch.empty(options.rank, output_width(tower, width)))
        self.up_DR = nn.Parameter(torch.zeros(width, options.rank))
        nn.init.kaiming_uniform_(self.down_RD, a=math.sqrt(5))

    def forward(self, source: ItemSource, tower: Any, projection: nn.Linear) -> HistoryItems:
        """Return the bank's rows under P + (alpha / rank) B A; valid are those that the bank has ever been given.

        Args:
            source: The V distinct history items.
            tower: Not called.
            projection: The target branch's map from the tower's output; only read.
        """
        rows_VD, written_V = source.bank_rows()
        bias_D = None if projection.bias is None else projection.bias.detach()
        weight_DD = projection.weight.detach()
        if self.rank:
            weight_DD = torch.addmm(weight_DD, self.up_DR, self.down_RD, alpha=self.scale)
        return HistoryItems(rows_VD.detach(), written_V, weight_DD, bias_D)
