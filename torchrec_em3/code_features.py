"""Semantic codes as ID features of the ranker, without a content tower.

Shape letters: U distinct target items, V distinct history items, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_em3.components.code_embedding import CodeEmbedding
from torchrec_em3.components.interest import target_attention
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.content_path import DistinctItems
from torchrec_em3.item_tokens import CodeSource
from torchrec_em3.schema import CodeSpec

__all__ = ["CodeFeatures"]


class CodeFeatures(nn.Module):
    """Two blocks for the ranker: `codes`, those of the target, and `codes_interest`, those of the history.

    An item's vector is the sum of the embeddings of all its codes, as a feature with several values is pooled; that of
    the history is their target attention. This is what the content tower has to beat where it reads the same codes.
    Source: codes as features of a ranker as in QARM [follow-up], this form [ours].
    """

    def __init__(
        self, specs: Sequence[CodeSpec], codes: CodeSource | None, width: int, attention_hidden: Sequence[int]
    ) -> None:
        """Create the embeddings.

        Args:
            specs: The codes, at least one; all are in `codes`.
            codes: Codes of the catalogue; may be None for a model that is planned and never run.
            width: D.
            attention_hidden: Hidden widths of the attention over the history.
        """
        super().__init__()
        self._codes = codes
        self.embeddings = nn.ModuleDict(
            {spec.name: CodeEmbedding(spec.levels, spec.codes_per_level, width) for spec in specs}
        )
        self.attention = target_attention(width, attention_hidden)

    def forward(self, items: DistinctItems) -> dict[str, Tensor]:
        """Return the blocks [B, D] by name; zeros for an item, or a history, without codes."""
        target, history = (self.pool(item) for item in (items.target_U, items.history_V))
        target_BD = target.rows_VD[items.row_B]
        return {
            "codes": target_BD,
            "codes_interest": self.attention(target_BD, history, items.row_N, items.lengths_B),
        }

    def pool(self, item_V: Tensor) -> HistoryItems:
        """Return the vectors of items, catalogue rows, and which have codes by any quantiser."""
        assert self._codes is not None, "a model with codes needs a code store"
        codes = self._codes.fetch(item_V, item_V.device)
        sums, present = [], []
        for name, embedding in self.embeddings.items():
            assert isinstance(embedding, CodeEmbedding)
            sums.append(embedding.pooled(codes[name]))
            present.append(codes[name].present_U)
        return HistoryItems(torch.stack(sums).sum(0), torch.stack(present).any(0))
