"""Kernels of the contrastive loss for CUDA devices: the sums of rows and columns in one pass, and the gradient.

Shape letters: N rows, M columns, D width, R rows and C columns of a tile, S width rounded up to a power of two.

A program keeps R rows and goes through the columns, C at a time. Every output element is written by one program, so
the same tiles give the same bits; which tiles are fastest is measured once and kept on disk. Sums and the gradient are
float32; products are float32 for float32 vectors, never TF32, and the tensor cores' for half precision.

Columns ascend by item, so a row's own item is a range of columns; it is compared in those tiles only that the range of
a tile's rows reaches. Up to |s| = 40 exp(s) is summed as it is. Beyond (SHIFTED) weights, u and v come as logarithms,
and sums leave with the exponent that was taken out of them: no value overflows, at one more exponential an element.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from triton import language as tl

__all__ = ["INTERPRETED", "Tile", "gradient_kernel", "sums_kernel", "tiles_of", "tuned"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run on the CPU, one NumPy call an operation; TRITON_INTERPRET=1 before the import."""
LOWEST = tl.constexpr(-1000.0)
"""Start of a running maximum, in powers of two: below any |s| <= 300, and finite, so that no inf - inf arises."""


@triton.jit
def _load_vectors(
    vectors: tl.tensor, place_R: tl.tensor, length: tl.tensor, WIDTH: tl.constexpr, SPAN: tl.constexpr
) -> tl.tensor:
    """Return vectors [R, S], zeros beyond the length and the width; offsets are 64 bits wide."""
    lane_S = tl.arange(0, SPAN)
    inside = place_R[:, None] < length
    if SPAN != WIDTH:
        inside = inside & (lane_S[None, :] < WIDTH)
    return tl.load(vectors + place_R[:, None].to(tl.int64) * WIDTH + lane_S[None, :], mask=inside, other=0.0)


@triton.jit
def _multiply(left: tl.tensor, right: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return left @ right, summed in float32."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _load_own(first: tl.tensor, last: tl.tensor, place_R: tl.tensor, rows: tl.tensor, columns: tl.tensor) -> tl.tuple:
    """Return the range of columns with each row's item, and that of all rows together; empty beyond the rows."""
    first_R = tl.load(first + place_R, mask=place_R < rows, other=columns)
    last_R = tl.load(last + place_R, mask=place_R < rows, other=0)
    any_R = first_R < last_R
    return first_R, last_R, tl.min(tl.where(any_R, first_R, columns), 0), tl.max(tl.where(any_R, last_R, 0), 0)


@triton.jit
def _powers(
    row_RS: tl.tensor,
    column_CS: tl.tensor,
    start: tl.tensor,
    own: tl.tuple,
    power_scale: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return s as a power of two, -inf where a column has the row's own item."""
    first_R, last_R, first, last = own
    power_RC = _multiply(row_RS, tl.trans(column_CS), "ieee") * power_scale
    if (start < last) & (start + COLUMNS > first):
        place_C = start + tl.arange(0, COLUMNS)
        same_RC = (place_C[None, :] >= first_R[:, None]) & (place_C[None, :] < last_R[:, None])
        power_RC = tl.where(same_RC, float("-inf"), power_RC)
    return power_RC


@triton.jit(do_not_specialize=["rows", "columns", "size_class"])
def sums_kernel(
    row_vectors: tl.tensor,
    column_vectors: tl.tensor,
    row_weights: tl.tensor,
    column_weights: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    row_sums: tl.tensor,
    row_shifts: tl.tensor,
    column_sums: tl.tensor,
    column_shifts: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    power_scale: tl.tensor,
    size_class: tl.tensor,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write weighted sums of exp(s): of rows [splits, N] over a share of the columns, of columns [blocks, M]."""
    block, split = tl.program_id(0), tl.program_id(1)
    NO_WEIGHT: tl.constexpr = float("-inf") if SHIFTED else 0.0
    place_R = block * ROWS + tl.arange(0, ROWS)
    row_RS = _load_vectors(row_vectors, place_R, rows, WIDTH, SPAN)
    row_weight_R = tl.load(row_weights + place_R, mask=place_R < rows, other=NO_WEIGHT)
    own = _load_own(first, last, place_R, rows, columns)
    row_sum_R = tl.zeros([ROWS], dtype=tl.float32)
    row_shift_R = tl.full([ROWS], LOWEST, dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(columns, COLUMNS), tl.num_programs(1)) * COLUMNS
    for start in range(split * share, tl.minimum(columns, (split + 1) * share), COLUMNS):
        place_C = start + tl.arange(0, COLUMNS)
        column_CS = _load_vectors(column_vectors, place_C, columns, WIDTH, SPAN)
        column_weight_C = tl.load(column_weights + place_C, mask=place_C < columns, other=NO_WEIGHT)
        power_RC = _powers(row_RS, column_CS, start, own, power_scale, COLUMNS)
        out_C = block.to(tl.int64) * columns + place_C
        if SHIFTED:
            along_RC = power_RC + column_weight_C[None, :]
            shift_R = tl.maximum(row_shift_R, tl.max(along_RC, 1))
            row_sum_R = row_sum_R * tl.exp2(row_shift_R - shift_R) + tl.sum(tl.exp2(along_RC - shift_R[:, None]), 1)
            row_shift_R = shift_R
            down_RC = power_RC + row_weight_R[:, None]
            column_shift_C = tl.maximum(tl.max(down_RC, 0), LOWEST)
            column_sum_C = tl.sum(tl.exp2(down_RC - column_shift_C[None, :]), 0)
            tl.store(column_shifts + out_C, column_shift_C, mask=place_C < columns)
        else:
            value_RC = tl.exp2(power_RC)
            row_sum_R += tl.sum(value_RC * column_weight_C[None, :], 1)
            column_sum_C = tl.sum(value_RC * row_weight_R[:, None], 0)
        tl.store(column_sums + out_C, column_sum_C, mask=place_C < columns)
    out_R = split.to(tl.int64) * rows + place_R
    tl.store(row_sums + out_R, row_sum_R, mask=place_R < rows)
    if SHIFTED:
        tl.store(row_shifts + out_R, row_shift_R, mask=place_R < rows)


@triton.jit(do_not_specialize=["rows", "columns", "size_class"])
def gradient_kernel(
    row_vectors: tl.tensor,
    column_vectors: tl.tensor,
    row_slopes: tl.tensor,
    column_slopes: tl.tensor,
    column_weights: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    gradient: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    power_scale: tl.tensor,
    size_class: tl.tensor,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    SHIFTED: tl.constexpr,
    SLOPE_DTYPE: tl.constexpr,
    SLOPE_PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write sum_j exp(s_ij) (u_i + v_j) p_j column_j; `row_slopes` is u, `column_slopes` v p, `column_weights` p."""
    NO_WEIGHT: tl.constexpr = float("-inf") if SHIFTED else 0.0
    place_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_RS = _load_vectors(row_vectors, place_R, rows, WIDTH, SPAN)
    u_R = tl.load(row_slopes + place_R, mask=place_R < rows, other=0.0)
    own = _load_own(first, last, place_R, rows, columns)
    gradient_RS = tl.zeros([ROWS, SPAN], dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        place_C = start + tl.arange(0, COLUMNS)
        column_CS = _load_vectors(column_vectors, place_C, columns, WIDTH, SPAN)
        weight_C = tl.load(column_weights + place_C, mask=place_C < columns, other=NO_WEIGHT)
        slope_C = tl.load(column_slopes + place_C, mask=place_C < columns, other=NO_WEIGHT)
        power_RC = _powers(row_RS, column_CS, start, own, power_scale, COLUMNS)
        if SHIFTED:
            slope_RC = tl.exp2(power_RC + (u_R[:, None] + weight_C[None, :])) + tl.exp2(power_RC + slope_C[None, :])
        else:
            slope_RC = tl.exp2(power_RC) * (u_R[:, None] * weight_C[None, :] + slope_C[None, :])
        gradient_RS += _multiply(slope_RC.to(SLOPE_DTYPE), column_CS.to(SLOPE_DTYPE), SLOPE_PRECISION)
    lane_S = tl.arange(0, SPAN)
    out_RS = gradient + place_R[:, None].to(tl.int64) * WIDTH + lane_S[None, :]
    tl.store(out_RS, gradient_RS, mask=(place_R[:, None] < rows) & (lane_S[None, :] < WIDTH))


class Tile(NamedTuple):
    """Shape of a tile and how a program works on it."""

    rows: int
    columns: int
    warps: int
    stages: int


_HALF_SUMS = {
    128: [Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 4, 3)],
    256: [Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)],
}
# By kernel and type, up to which width; all tiles of sums for one width have as many rows. Compiled for sm_80 and
# sm_90, none of them spills registers; tiles that did, as 128 x 64 with 4 warps for the gradient at 128, are not here.
_TILES: dict[tuple[str, torch.dtype], dict[int, list[Tile]]] = {
    ("sums", torch.bfloat16): _HALF_SUMS,
    ("sums", torch.float16): _HALF_SUMS,
    ("sums", torch.float32): {128: [Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)]},
    ("gradient", torch.bfloat16): {
        128: [Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 4, 2), Tile(64, 64, 4, 3)],
        256: [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)],
    },
    ("gradient", torch.float16): {
        128: [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)],
        256: [Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)],
    },
    ("gradient", torch.float32): {
        64: [Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2)],
        128: [Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)],
    },
}
_KERNELS = {"sums": sums_kernel, "gradient": gradient_kernel}


def tiles_of(kernel: str, dtype: torch.dtype, span: int) -> list[Tile]:
    """Return the tiles that `kernel` ("sums" or "gradient") may take for vectors of this type and rounded width."""
    if INTERPRETED:
        return [Tile(32, 16, 4, 1)]
    by_width = _TILES[kernel, dtype]
    return by_width[min(width for width in by_width if span <= width)]


@cache
def tuned(kernel: str, dtype: torch.dtype, span: int) -> triton.runtime.Autotuner:
    """Return the kernel with a choice of tiles, timed once for every power of two of columns."""
    configs = [
        triton.Config({"ROWS": tile.rows, "COLUMNS": tile.columns}, num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles_of(kernel, dtype, span)
    ]
    return triton.autotune(configs, key=["size_class", "SHIFTED"], cache_results=True)(_KERNELS[kernel])
