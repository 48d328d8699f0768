"""The grid on a CUDA device: Triton kernels that make each tile in registers, where nothing of it is written.

Shape letters: N rows, M columns, D width, R rows of one launch, S splits of the columns, B blocks of rows, P either, K
kinds of partial results (sums, and their shifts where there are any).
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from torchrec_em3.components.alignment.grid import Side
from torchrec_em3.components.alignment.triton_kernels import tiles_of, tuned

__all__ = ["TritonGrid"]

CHUNK_ROWS = 8192  # rows of one launch of the sums: bounds the partial sums of columns to 256 bytes a column
SPLITS = 8  # programs that share the columns of one block of rows: 512 programs a launch keep 132 processors busy
LOG2_E = 1.4426950408889634


class _Meeting(NamedTuple):
    """Range of the columns with the item of each row, int32; empty where there is none."""

    first_N: Tensor
    last_N: Tensor

    @classmethod
    def of(cls, item_N: Tensor, item_M: Tensor) -> "_Meeting":
        """Find each row's item among the columns; both ascend."""
        first, last = (torch.searchsorted(item_M, item_N, right=right, out_int32=True) for right in (False, True))
        return cls(first, last)


class TritonGrid:
    """A `Grid` whose vectors are bfloat16, float16 or float32, and whose weights are float32 up to |s| = 40.

    With float64 weights the kernels work in float32 all the same, but on logarithms; float64 only holds what they sum.
    Deterministic: no sum depends on the order in which programs end.
    """

    def __init__(self, rows: Side, columns: Side, scale: float) -> None:
        """Take the two sides."""
        self.rows, self.columns, self.scale = rows, columns, scale
        self._shifted = rows.weight_N.dtype == torch.float64
        self._empty = not len(rows.item_N) or not len(columns.item_N)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of each row and of each column; see `Grid`."""
        row_N, column_M = torch.zeros_like(self.rows.weight_N), torch.zeros_like(self.columns.weight_N)
        if self._empty:
            return row_N, column_M
        for start in range(0, len(row_N), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            row_N[chunk], part_M = self._sums_of(Side(*(value[chunk] for value in self.rows)))
            column_M += part_M
        return row_N, column_M

    def gradients(
        self, u_N: Tensor, v_M: Tensor, wants_rows: bool, wants_columns: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the row and the column vectors, each from a launch of its own; see `Grid`."""
        return (
            self._gradient_of(self.rows, self.columns, u_N, v_M) if wants_rows else None,
            self._gradient_of(self.columns, self.rows, v_M, u_N) if wants_columns else None,
        )

    def _sums_of(self, rows: Side) -> tuple[Tensor, Tensor]:
        """Return the sums of some rows, and what these rows add to the columns."""
        columns, num_rows, num_columns = self.columns, len(rows.item_N), len(self.columns.item_N)
        (block_rows,) = {tile.rows for tile in tiles_of("sums", rows.vector_ND.dtype, _span(rows))}
        blocks = triton.cdiv(num_rows, block_rows)
        kinds = 2 if self._shifted else 1
        row_KSR = rows.vector_ND.new_empty(kinds, SPLITS, num_rows, dtype=torch.float32)
        column_KBM = rows.vector_ND.new_empty(kinds, blocks, num_columns, dtype=torch.float32)
        self._launch(
            "sums",
            (blocks, SPLITS),
            rows,
            columns,
            row_weights=self._weights(rows.weight_N),
            column_weights=self._weights(columns.weight_N),
            row_sums=row_KSR[0],
            row_shifts=row_KSR[-1],
            column_sums=column_KBM[0],
            column_shifts=column_KBM[-1],
        )
        return self._total(row_KSR), self._total(column_KBM)

    def _total(self, parts_KPN: Tensor) -> Tensor:
        """Return the sum over the parts P, in the type of the weights."""
        if self._shifted:
            sum_PN, shift_PN = parts_KPN.double()
            return (sum_PN * shift_PN.exp2()).sum(0)
        return parts_KPN[0].sum(0)

    def _gradient_of(self, rows: Side, columns: Side, u_N: Tensor, v_M: Tensor) -> Tensor:
        """Return the gradient of the vectors of `rows`, float32."""
        gradient_ND = torch.zeros_like(rows.vector_ND, dtype=torch.float32)
        if self._empty:
            return gradient_ND
        dtype = rows.vector_ND.dtype
        # A slope may be far below what float16 can hold; TF32 holds every float16 and has the exponent of float32.
        slope = {torch.bfloat16: (tl.bfloat16, "ieee"), torch.float16: (tl.float32, "tf32")}
        slope_dtype, precision = slope.get(dtype, (tl.float32, "ieee"))
        self._launch(
            "gradient",
            lambda tile: (triton.cdiv(len(rows.item_N), tile["ROWS"]),),
            rows,
            columns,
            row_slopes=self._weights(u_N),
            column_slopes=self._weights(v_M * columns.weight_N),
            column_weights=self._weights(columns.weight_N),
            gradient=gradient_ND,
            SLOPE_DTYPE=slope_dtype,
            SLOPE_PRECISION=precision,
        )
        return gradient_ND.mul_((rows.weight_N * self.scale).to(torch.float32)[:, None])

    def _weights(self, weight_N: Tensor) -> Tensor:
        """Return weights as the kernels take them: float32, and as powers of two where sums are shifted."""
        return (weight_N.log2() if self._shifted else weight_N).to(torch.float32)

    def _launch(self, kernel: str, programs: Any, rows: Side, columns: Side, **arguments: Any) -> None:
        """Call the kernel for these rows and columns; every argument by its name."""
        meeting = _Meeting.of(rows.item_N, columns.item_N)
        vectors = [side.vector_ND.contiguous() for side in (rows, columns)]
        with torch.cuda.device_of(vectors[0]):
            tuned(kernel, vectors[0].dtype, _span(rows))[programs](
                row_vectors=vectors[0],
                column_vectors=vectors[1],
                first=meeting.first_N,
                last=meeting.last_N,
                rows=len(rows.item_N),
                columns=len(columns.item_N),
                power_scale=self.scale * LOG2_E,
                size_class=len(columns.item_N).bit_length(),
                WIDTH=rows.vector_ND.shape[1],
                SPAN=_span(rows),
                SHIFTED=self._shifted,
                **arguments,
            )


def _span(side: Side) -> int:
    """Return the width of the vectors as tiles hold it."""
    return max(16, triton.next_power_of_2(side.vector_ND.shape[1]))
