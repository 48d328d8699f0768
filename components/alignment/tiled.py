"""Exact symmetric InfoNCE in O(N D + tile^2) memory: the N x M matrix of similarities exists one tile at a time.

Shape letters: N rows of this process, M columns (the items of all processes; N of them are the rows), D width.

    s_ij = scale * <content_i, id_j>
    n_i  = sum of p_j exp(s_ij) over all j with another item than i      content looks for its ID
    m_i  = sum of p_j exp(s_ji) over all j with another item than i      ID looks for its content
    loss = sum_i w_i [log(1 + n_i exp(-s_ii)) + log(1 + m_i exp(-s_ii))] / (2 sum w),      p_j = w_j / q_j

The sums hold negatives only, so a loss near zero keeps all its digits. Two passes over the tiles: the first takes n and
m from one product and one exponential; the second makes each tile again and multiplies it by (u_i + v_j), the whole
gradient with respect to s but for the factors p_i p_j, which the operands carry:

    u_i = q_i / (2 sum w (exp(s_ii) + n_i)),   v_j = q_j / (2 sum w (exp(s_jj) + m_j))
    d loss / d s_ij = p_i p_j exp(s_ij) (u_i + v_j)                       i and j of different items
    d loss / d s_ii = -w_i (sigmoid(log n_i - s_ii) + sigmoid(log m_i - s_ii)) / (2 sum w)

The loss is a scalar, so its gradients are made in the forward pass and only scaled in the backward one. Tiles are the
idea of the memory-efficient contrastive losses in public use; the one-product form, weights and masks are [ours].
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_em3.errors import ConfigError, NumericError

__all__ = ["FLOAT32_SCALE", "LARGEST_SCALE", "Alone", "Wants", "contrast", "tiled_info_nce"]

CPU_TILE = 512  # fits the caches; 256 to 1024 differ by less than a tenth (benchmarks/cic.py --tile)
DEVICE_TILE = 4096  # accelerators: enough work for one kernel launch, two buffers of 64 MiB; not tuned
FLOAT32_SCALE = 40.0  # exp(+-40) and sums of 1e6 such terms are normal float32 numbers: no shift is needed up to here
LARGEST_SCALE = 300.0  # the same for float64, which holds exp(+-700)
ROUNDING = 1.0 + 1e-5  # exp(log(40)) in float32 may come out above 40


class Wants(NamedTuple):
    """Which inputs need a gradient; all ranks must agree, because it decides which collectives run."""

    content: bool
    id: bool
    scale: bool


class Alone:
    """What the loss needs of other processes, for one that works alone: the columns are its own rows.

    Attributes:
        world_size: Number of processes.
        item_M: Item of every column, int64, ascending.
        own: Index of this process's rows among the columns.
        wants: Gradients that any process needs.
    """

    world_size = 1

    def __init__(self, item_N: Tensor, wants: Wants) -> None:
        """Take this process's items, ascending."""
        self.item_M = item_N
        self.own: slice | Tensor = slice(None)
        self.wants = wants

    def gather(self, own_N: Tensor) -> Tensor:
        """Return the rows of all processes in column order; any trailing shape."""
        return own_N

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of a tensor of equal shape over all processes."""
        return part

    def own_sum(self, part_M: Tensor) -> Tensor:
        """Return this process's rows of the sum over all processes; any trailing shape."""
        return part_M


class _Side(NamedTuple):
    """Rows or columns of the grid, ascending by item; `weight_N` is p, the weight as a negative."""

    vector_ND: Tensor
    item_N: Tensor
    weight_N: Tensor


class _Tiles:
    """The grid of exp(s) with zeros where both items are the same, made tile by tile in one buffer."""

    def __init__(self, rows: _Side, columns: _Side, scale: float, size: int) -> None:
        self.rows, self.columns, self.scale = rows, columns, scale
        self._row_cuts, self._column_cuts = _cuts(len(rows.item_N), size), _cuts(len(columns.item_N), size)
        self._buffer = self.buffer()
        self._first_meeting, self._last_meeting = self._meetings()

    def buffer(self) -> Tensor:
        """Return uninitialised space for the largest tile."""
        shape = [cuts[0].stop if cuts else 0 for cuts in (self._row_cuts, self._column_cuts)]
        return self.rows.vector_ND.new_empty(shape[0] * shape[1])

    def _meetings(self) -> tuple[list[int], list[int]]:
        """Return, for each row of tiles, the range of column tiles that share an item with it."""
        row_first, row_last = _ends(self.rows.item_N, self._row_cuts)
        column_first, column_last = _ends(self.columns.item_N, self._column_cuts)
        first = torch.searchsorted(column_last, row_first)
        last = torch.searchsorted(column_first, row_last, right=True)
        return first.tolist(), last.tolist()

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield each tile's rows, columns and values; the values are overwritten by the next tile."""
        column_DM = self.columns.vector_ND.t()
        for number, i in enumerate(self._row_cuts):
            meeting = range(self._first_meeting[number], self._last_meeting[number])
            for other, j in enumerate(self._column_cuts):
                tile = _shaped(self._buffer, i, j)
                tile.addmm_(self.rows.vector_ND[i], column_DM[:, j], beta=0, alpha=self.scale).exp_()
                if other in meeting:
                    tile.masked_fill_(self.rows.item_N[i, None] == self.columns.item_N[None, j], 0.0)
                yield i, j, tile

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of each row over its columns and of each column over its rows."""
        row_N, column_M = torch.zeros_like(self.rows.weight_N), torch.zeros_like(self.columns.weight_N)
        for i, j, tile in self:
            row_N[i].addmv_(tile, self.columns.weight_N[j])
            column_M[j].addmv_(tile.t(), self.rows.weight_N[i])
        return row_N, column_M

    def gradients(self, u_N: Tensor, v_M: Tensor, wants_rows: bool, wants_columns: bool) -> tuple[Tensor, Tensor]:
        """Return the negatives' share of the gradients of the row and the column vectors; zeros where not wanted."""
        weighted = [side.vector_ND * side.weight_N[:, None] for side in (self.rows, self.columns)]
        row_ND, column_MD = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[1])
        buffer = self.buffer()
        for i, j, tile in self:
            slope = torch.add(u_N[i, None], v_M[None, j], out=_shaped(buffer, i, j)).mul_(tile)
            if wants_rows:
                row_ND[i].addmm_(slope, weighted[1][j])
            if wants_columns:
                column_MD[j].addmm_(slope.t(), weighted[0][i])
        row_ND.mul_(self.rows.weight_N[:, None]).mul_(self.scale)
        column_MD.mul_(self.columns.weight_N[:, None]).mul_(self.scale)
        return row_ND, column_MD


def _cuts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _ends(item_N: Tensor, cuts: list[slice]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest item of each cut of an ascending list."""
    first = torch.tensor([cut.start for cut in cuts], dtype=torch.int64, device=item_N.device)
    last = torch.tensor([cut.stop - 1 for cut in cuts], dtype=torch.int64, device=item_N.device)
    return item_N[first], item_N[last]


def _shaped(buffer: Tensor, i: slice, j: slice) -> Tensor:
    height, width = i.stop - i.start, j.stop - j.start
    return buffer[: height * width].view(height, width)


class _Problem(NamedTuple):
    """Everything but the three differentiable inputs."""

    peers: Alone
    weight_M: Tensor
    q_M: Tensor
    tile: int


class _Solution(NamedTuple):
    loss: Tensor
    d_content_ND: Tensor | None
    d_id_ND: Tensor | None
    d_scale: Tensor | None


def _exact_type(content_ND: Tensor, id_ND: Tensor) -> torch.dtype:
    """Return float64 if an input is, else float32."""
    return torch.promote_types(torch.promote_types(content_ND.dtype, id_ND.dtype), torch.float32)


def _solve(content_ND: Tensor, id_ND: Tensor, scale: float, problem: _Problem) -> _Solution:
    """Return this process's share of the loss, times the number of processes, and the gradients, scaled likewise."""
    peers, own = problem.peers, problem.peers.own
    dtype = torch.float64 if scale > FLOAT32_SCALE * ROUNDING else _exact_type(content_ND, id_ND)
    column_MD = peers.gather(id_ND).to(dtype)
    content_ND, id_ND = content_ND.to(dtype), id_ND.to(dtype)
    weight_M, q_M = problem.weight_M.to(dtype), problem.q_M.to(dtype)
    negative_M = weight_M / q_M
    columns = _Side(column_MD, peers.item_M, negative_M)
    tiles = _Tiles(_Side(content_ND, peers.item_M[own], negative_M[own]), columns, scale, problem.tile)

    row_sum_N, column_part_M = tiles.sums()
    positive_N = (content_ND * id_ND).sum(1) * scale
    parts_2M = torch.stack([column_part_M, torch.zeros_like(column_part_M)])
    parts_2M[1, own] = positive_N.exp()
    column_sum_M, positive_exp_M = peers.sum(parts_2M)

    half = 0.5 / weight_M.sum().clamp_min(torch.finfo(dtype).tiny)
    log_odds_2N = torch.stack([row_sum_N, column_sum_M[own]]).log() - positive_N
    # softplus, exact at both ends: F.softplus returns x beyond its threshold, which is not enough for float64
    terms_N = torch.logaddexp(log_odds_2N, torch.zeros_like(log_odds_2N)).sum(0)
    loss = half * (weight_M[own] * terms_N).sum() * peers.world_size
    if not any(peers.wants):
        return _Solution(loss, None, None, None)

    wants_id = peers.wants.id
    wants_content = peers.wants.content or not wants_id  # the scale's gradient follows from either side's
    u_N = half * q_M[own] / (row_sum_N + positive_N.exp())
    v_M = half * q_M / (column_sum_M + positive_exp_M)
    pull_N1 = (half * scale * weight_M[own] * log_odds_2N.sigmoid().sum(0))[:, None]
    d_content_ND, d_column_MD = tiles.gradients(u_N, v_M, wants_content, wants_id)
    d_content_ND = (d_content_ND - pull_N1 * id_ND) * peers.world_size
    d_id_ND = (peers.own_sum(d_column_MD) - pull_N1 * content_ND) * peers.world_size if wants_id else None
    known, vector_ND = (d_content_ND, content_ND) if d_id_ND is None or wants_content else (d_id_ND, id_ND)
    return _Solution(loss, d_content_ND, d_id_ND, (known * vector_ND).sum() / scale)


class _Contrast(torch.autograd.Function):
    """Loss whose gradients are ready when it is."""

    @staticmethod
    def forward(ctx: Any, content_ND: Tensor, id_ND: Tensor, scale: Tensor, problem: _Problem) -> Tensor:
        solution = _solve(content_ND, id_ND, float(scale.detach()), problem)
        exact = _exact_type(content_ND, id_ND)
        gradients = zip(solution[1:], ctx.needs_input_grad, strict=False)
        ctx.save_for_backward(*(grad.to(exact) if need and grad is not None else None for grad, need in gradients))
        ctx.dtypes = [value.dtype for value in (content_ND, id_ND, scale)]
        return solution.loss.to(exact)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a constant upstream gradient through, and give a second derivative of zero.
        if torch.is_grad_enabled():
            raise RuntimeError("the contrastive loss has no second derivative; call backward without create_graph")
        (slope,) = upstream
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # A loss scaler's factor is applied before the gradient is rounded to half precision.
        return *(None if grad is None else (grad * slope).to(dtype) for grad, dtype in gradients), None


def contrast(
    content_ND: Tensor, id_ND: Tensor, scale: Tensor, peers: Alone, weight_M: Tensor, q_M: Tensor, tile: int = 0
) -> Tensor:
    """Return this process's share of the symmetric InfoNCE loss over the items of all processes.

    Args:
        content_ND: Content of this process's items, L2-normalised, ordered as `peers.own`.
        id_ND: ID embeddings of the same items, L2-normalised.
        scale: 1 / temperature, scalar, the same on all processes.
        peers: The other processes.
        weight_M: Weight of every column as a row of the loss.
        q_M: Over-representation of every column as a negative; 1 means none.
        tile: Rows and columns of a tile; 0 picks for the device.

    Returns:
        Scalar whose mean over the processes is the loss; float64 if an input is, else float32. Its gradients are
        `peers.world_size` times those of the loss, so that parameter gradients averaged over processes are right too.

    Raises:
        NumericError: If the scale is not finite.
        ConfigError: If the scale is not positive or beyond LARGEST_SCALE.
    """
    value = float(scale.detach())
    if not math.isfinite(value):
        raise NumericError(f"contrastive loss: scale (1 / temperature) is {value}; the learnt temperature has diverged")
    if not 0 < value <= LARGEST_SCALE * ROUNDING:
        raise ConfigError(
            f"contrastive loss: scale {value:g} is outside (0, {LARGEST_SCALE:g}]; "
            f"use a temperature of at least {1 / LARGEST_SCALE:.4f}"
        )
    tile = tile or (CPU_TILE if content_ND.device.type == "cpu" else DEVICE_TILE)
    problem = _Problem(peers, weight_M, q_M, tile)
    loss: Tensor = _Contrast.apply(content_ND, id_ND, scale, problem)  # type: ignore[no-untyped-call]
    return loss


def wants_of(content_ND: Tensor, id_ND: Tensor, scale: Tensor) -> Wants:
    """Return which of the inputs need a gradient here."""
    return Wants(*(torch.is_grad_enabled() and value.requires_grad for value in (content_ND, id_ND, scale)))


def check_shapes(content_ND: Tensor, id_ND: Tensor, item_N: Tensor) -> None:
    """Raise ValueError unless both sides are [N, D] of equal shape and the items int64 [N]."""
    if content_ND.ndim != 2 or content_ND.shape != id_ND.shape or item_N.shape != content_ND.shape[:1]:
        shapes = [tuple(value.shape) for value in (content_ND, id_ND, item_N)]
        raise ValueError(f"content {shapes[0]} and ID {shapes[1]} must be [N, D] and alike, items {shapes[2]} be [N]")
    if item_N.dtype != torch.int64:
        raise ValueError(f"items must be int64, not {item_N.dtype}: float32 merges rows above 2^24")


def tiled_info_nce(
    content_ND: Tensor,
    id_ND: Tensor,
    item_N: Tensor,
    scale: Tensor | float,
    *,
    weight_N: Tensor | None = None,
    log_q_N: Tensor | None = None,
    tile: int = 0,
) -> Tensor:
    """Return the symmetric InfoNCE loss of one process, exactly, without the N x N matrix.

    Pairs of rows with the same item are never negatives of each other. A row of weight k counts like k equal rows.

    Args:
        content_ND: Content vectors, any float type, L2-normalised: |s| <= scale is what keeps the sums finite.
        id_ND: ID vectors of the same items, L2-normalised.
        item_N: Catalogue rows, int64, in any order, repeats allowed.
        scale: 1 / temperature, in (0, 300]; a scalar tensor may require a gradient. Tiles are float64 above 40.
        weight_N: Weight of each row in the loss and as a negative; 1 if None.
        log_q_N: Subtracted from the logits of the row where it is a negative (log-popularity correction); 0 if None.
        tile: Rows and columns of a tile; 0 picks for the device.

    Returns:
        Scalar in nats, the weighted mean over rows and both directions; exactly 0 where there are no two different
        items. It can be differentiated once.

    Raises:
        ValueError: If the shapes disagree or the items are not int64.
        NumericError: If the scale is not finite.
        ConfigError: If the scale is not positive or above 300.
    """
    check_shapes(content_ND, id_ND, item_N)
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float64 if content_ND.device.type == "cpu" else torch.float32)
    order_N = torch.argsort(item_N, stable=True)
    ones_N = torch.ones_like(item_N, dtype=torch.float32)
    weight_N = ones_N if weight_N is None else weight_N[order_N]
    q_N = ones_N if log_q_N is None else log_q_N.exp()[order_N]
    peers = Alone(item_N[order_N], wants_of(content_ND, id_ND, scale))
    return contrast(content_ND[order_N], id_ND[order_N], scale, peers, weight_N, q_N, tile)
