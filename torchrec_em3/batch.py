"""The unit that flows from the loader into the model.

Shape letters: B rows of the batch, F dense features, K tasks, U unique items, T tokens, L levels of codes, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

__all__ = ["HISTORY", "TARGET", "Batch", "ItemCodes", "ModalityTokens"]

TARGET = "target"
HISTORY = "history"


class ModalityTokens(NamedTuple):
    """Tokens of one modality for U items.

    Attributes:
        tokens_UTD: Encoder outputs, float; whatever stands where `valid_UT` is False must not reach any result.
        valid_UT: False for padding and, in a whole row, for an item without this modality.
    """

    tokens_UTD: Tensor
    valid_UT: Tensor


class ItemCodes(NamedTuple):
    """Semantic codes of U items: one number a level, as a quantiser of their content gave them.

    Attributes:
        codes_UL: Numbers from 0, int64; 0 where the item has none.
        present_U: Which items have codes.
    """

    codes_UL: Tensor
    present_U: Tensor


@dataclass(frozen=True)
class Batch(Pipelineable):
    """Rows to rank, aligned by position; raggedness is carried by lengths, never by padding.

    Attributes:
        sparse: Keys are the user and side features, the sparse features of the event, then `target` (one catalogue row
            each) and `history` (catalogue rows, most recent last). Row 0 of every table is "unknown".
        dense: Dense features [B, F], float32; F may be 0.
        label: 1.0 or 0.0, float32: [B] where there is one task, else [B, K] in the order of the data's tasks, the main
            one first. A ranker's logits have the same shape.
        weight: Weight of the row in the loss, float32, 1 in the mean over the rows of all ranks; 0 marks a row that
            only fills up a batch, which also counts in no metric.
        user: Row of the user in users.parquet, int64; groups rows for per-user metrics, not looked up in any table.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    label: Tensor
    weight: Tensor
    user: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.label.shape[0])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch on `device`."""
        return Batch(
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            dense=self.dense.to(device, non_blocking=non_blocking),
            label=self.label.to(device, non_blocking=non_blocking),
            weight=self.weight.to(device, non_blocking=non_blocking),
            user=self.user.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until `stream` has used it (called by TorchRec's train pipelines)."""
        self.sparse.record_stream(stream)
        for tensor in (self.dense, self.label, self.weight, self.user):
            tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory."""
        return Batch(
            sparse=self.sparse.pin_memory(),
            dense=self.dense.pin_memory(),
            label=self.label.pin_memory(),
            weight=self.weight.pin_memory(),
            user=self.user.pin_memory(),
        )
