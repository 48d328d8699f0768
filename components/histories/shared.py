"""History content from the tower itself: the expensive upper bound.

Shape letters: V distinct history items, D width of the model.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.interfaces import HistoryItems, ItemSource
from torchrec_em3.registry import HISTORIES, NoOptions

__all__ = ["SharedHistory", "any_token"]


@HISTORIES.register("shared")
class SharedHistory(nn.Module):
    """Content of history items by the target's own tower and projection, trained from both sides.

    Costs a forward and backward pass of the tower for every distinct history item of the batch; for ablation. Source:
    [ours].

    Args:
        options: None.
        tower: Not kept; the model lends it at each call.
        width: D.
    """

    uses_bank: ClassVar[bool] = False

    def __init__(self, options: NoOptions, tower: nn.Module, width: int) -> None:
        super().__init__()

    def forward(self, source: ItemSource, tower: Any, projection: nn.Linear) -> HistoryItems:
        """Return the tower's output under its projection; valid are the items that have a token of any modality.

        Args:
            source: The V distinct history items.
            tower: The target branch's tower, trained from here too.
            projection: The target branch's map from the tower's output, trained from here too.
        """
        tokens = source.tokens()
        return HistoryItems(tower(tokens), any_token(tokens), projection.weight, projection.bias)


def any_token(tokens: Mapping[str, ModalityTokens]) -> Tensor:
    """Return which items have a valid token of any modality, bool [V]."""
    return torch.stack([modality.valid_UT.any(1) for modality in tokens.values()]).any(0)
