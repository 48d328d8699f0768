"""How the rows of a table are stored in a package, and how they become numbers again.

int8 and int4 are fbgemm's row-wise formats: each row carries its own scale and bias as two fp16 numbers, so a row of D
numbers takes D + 4 bytes, or D / 2 + 4, where D is a multiple of 4; others are made one first.

Shape letters: N rows, D width, X width made a multiple of 4, P bytes or numbers of a packed row.
"""

from typing import Literal, get_args

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import torch
from torch import Tensor

__all__ = ["PRECISIONS", "PackedTable", "Precision", "pack_rows"]

Precision = Literal["int8", "fp16", "fp32", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_BITS = {"int8": 8, "int4": 4}
_MULTIPLE = 4
"""fbgemm packs whole pairs of bytes: 2 numbers of int8, 4 of int4."""


def pack_rows(rows_ND: Tensor, precision: Precision) -> Tensor:
    """Return the rows as a package stores them, [N, P].

    Args:
        rows_ND: Float32.
        precision: How to store them.
    """
    if precision in _BITS:
        if missing := -rows_ND.shape[1] % _MULTIPLE:
            # The last number again, and not 0, which could widen the range that the row's scale has to cover.
            rows_ND = torch.cat([rows_ND, rows_ND[:, -1:].expand(-1, missing)], 1)
        return torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows_ND.contiguous(), _BITS[precision])
    return rows_ND.half() if precision == "fp16" else rows_ND


class PackedTable:
    """A table of a package; rows are unpacked when they are looked up.

    Attributes:
        num_rows: N.
    """

    def __init__(self, packed_NP: Tensor, precision: Precision, width: int | None = None) -> None:
        """Take what `pack_rows` made.

        Args:
            packed_NP: The packed rows.
            precision: How they are stored.
            width: D; None where it is that of the packed rows.
        """
        self._packed_NP, self._precision, self._width = packed_NP, precision, width
        self.num_rows = len(packed_NP)

    def __call__(self, row_N: Tensor) -> Tensor:
        """Return float32 [N, D] of the rows `row_N` (int64, in range)."""
        packed_NP = self._packed_NP.index_select(0, row_N)
        if self._precision in _BITS:
            rows_NX = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed_NP, _BITS[self._precision])
            return rows_NX[:, : self._width]
        return packed_NP.float()
