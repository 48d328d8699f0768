"""Trainable embeddings of semantic codes.

Shape letters: U items, L levels, D width of an embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.batch import ItemCodes, ModalityTokens

__all__ = ["CodeEmbedding"]

INITIAL_STD = 0.02


class CodeEmbedding(nn.Module):
    """One table of embeddings for each level of an item's codes, all levels in one matrix.

    Code tables have hundreds to thousands of rows, of which every step touches most, so they are ordinary dense
    parameters, replicated and averaged like the other layers, and not sharded tables. Source: trainable embeddings of
    quantised codes as in QARM [follow-up], this form [ours].

    Args:
        levels: Codes of an item, L.
        codes_per_level: Codes are 0 to this number less 1; the caller checks.
        width: D.
    """

    def __init__(self, levels: int, codes_per_level: int, width: int) -> None:
        super().__init__()
        self.codes_per_level = codes_per_level
        self.weight = nn.Parameter(torch.empty(levels * codes_per_level, width).normal_(std=INITIAL_STD))

    def forward(self, codes: ItemCodes) -> ModalityTokens:
        """Return the embeddings of the codes as tokens [U, L, D], a token a level; invalid where there are no codes."""
        valid_UL = codes.present_U[:, None].expand_as(codes.codes_UL)
        return ModalityTokens(functional.embedding(self._rows(codes), self.weight), valid_UL)

    def pooled(self, codes: ItemCodes) -> Tensor:
        """Return the sum of each item's embeddings [U, D]; zeros where there are no codes."""
        sum_UD = functional.embedding_bag(self._rows(codes), self.weight, mode="sum")
        return torch.where(codes.present_U[:, None], sum_UD, 0.0)

    def _rows(self, codes: ItemCodes) -> Tensor:
        """Return the row of the matrix that each code has, [U, L]."""
        levels = codes.codes_UL.shape[1]
        return codes.codes_UL + self.codes_per_level * torch.arange(levels, device=codes.codes_UL.device)
