"""Exact symmetric InfoNCE in O(N D) memory: the N x M matrix of similarities exists in tiles only.

Shape letters: N rows of this process, M columns (the items of all processes; N of them are the rows), K columns shown
at a time, D width.

    s_ij = scale * <content_i, id_j>
    n_i  = sum of p_j exp(s_ij) over all j with another item than i      content looks for its ID
    m_i  = sum of p_j exp(s_ji) over all j with another item than i      ID looks for its content
    loss = sum_i w_i [log(1 + n_i exp(-s_ii)) + log(1 + m_i exp(-s_ii))] / (2 sum w),      p_j = w_j / q_j

The sums hold negatives only, so a loss near zero keeps all its digits. Two passes over the grid of pairs: the first
takes n and m from one product and one exponential; the second makes each tile again and multiplies it by (u_i + v_j),
the whole gradient with respect to s but for the factors p_i p_j, which the operands carry:

    u_i = q_i / (2 sum w (exp(s_ii) + n_i)),   v_j = q_j / (2 sum w (exp(s_jj) + m_j))
    d loss / d s_ij = p_i p_j exp(s_ij) (u_i + v_j)                       i and j of different items
    d loss / d s_ii = -w_i (sigmoid(log n_i - s_ii) + sigmoid(log m_i - s_ii)) / (2 sum w)

The loss is a scalar, so its gradients are made in the forward pass and only scaled in the backward one. Tiles are the
idea of the memory-efficient contrastive losses in public use; the one-product form, weights and masks are [ours].

A backend goes through the grid (`backend.py`), `peers` say where the columns come from (`peers.py`,
`distributed.py`); what is computed is said here, once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_em3.components.alignment.backend import Backend, BackendName, choose_backend
from torchrec_em3.components.alignment.grid import Grid, Side
from torchrec_em3.components.alignment.peers import Alone, Index, Wants
from torchrec_em3.errors import ConfigError, NumericError

__all__ = ["FLOAT32_SCALE", "LARGEST_SCALE", "check_shapes", "contrast", "info_nce", "wants_of"]

FLOAT32_SCALE = 40.0  # exp(+-40) and sums of 1e6 such terms are normal float32 numbers: no shift is needed up to here
LARGEST_SCALE = 300.0  # the same for float64, which holds exp(+-700)
ROUNDING = 1.0 + 1e-5  # exp(log(40)) in float32 may come out above 40


class _Problem(NamedTuple):
    """Everything but the three differentiable inputs."""

    peers: Alone
    weight_M: Tensor
    q_M: Tensor
    backend: Backend


class _Solution(NamedTuple):
    loss: Tensor
    d_content_ND: Tensor | None
    d_id_ND: Tensor | None
    d_scale: Tensor | None


class _Pairs:
    """The grid between this process's rows and the columns of all processes, as `peers` show them."""

    def __init__(self, content_ND: Tensor, negative_M: Tensor, scale: float, problem: _Problem) -> None:
        peers = problem.peers
        self._rows = Side(content_ND, peers.item_M[peers.own], negative_M[peers.own])
        self._negative_M, self._scale, self._peers, self._build = negative_M, scale, peers, problem.backend.build

    def _grid(self, columns: Index, vector_KD: Tensor) -> Grid:
        return self._build(
            self._rows, Side(vector_KD, self._peers.item_M[columns], self._negative_M[columns]), self._scale
        )

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return n and m of this process's items."""
        row_N = torch.zeros_like(self._rows.weight_N)

        def visit(columns: Index, vector_KD: Tensor) -> Tensor:
            part_N, column_K = self._grid(columns, vector_KD).sums()
            row_N.add_(part_N)
            return column_K

        column_N = self._peers.collect(visit)
        assert column_N is not None
        return row_N, column_N

    def gradients(self, u_N: Tensor, v_N: Tensor, wants: Wants) -> tuple[Tensor | None, Tensor | None]:
        """Return the negatives' share of the gradients of this process's content and ID vectors."""
        row_ND: Tensor | None = None
        v_M = self._peers.gather(v_N)

        def visit(columns: Index, vector_KD: Tensor) -> Tensor | None:
            nonlocal row_ND
            part_ND, column_KD = self._grid(columns, vector_KD).gradients(u_N, v_M[columns], wants.content, wants.id)
            if part_ND is not None:
                row_ND = part_ND if row_ND is None else row_ND.add_(part_ND)
            return column_KD

        column_ND = self._peers.collect(visit)
        return row_ND, column_ND


def _exact_type(content_ND: Tensor, id_ND: Tensor) -> torch.dtype:
    """Return float64 if an input is, else float32."""
    return torch.promote_types(torch.promote_types(content_ND.dtype, id_ND.dtype), torch.float32)


def _solve(content_ND: Tensor, id_ND: Tensor, scale: float, problem: _Problem) -> _Solution:
    """Return this process's share of the loss, times the number of processes, and the gradients, scaled likewise."""
    peers, own = problem.peers, problem.peers.own
    dtype = torch.float64 if scale > FLOAT32_SCALE * ROUNDING else _exact_type(content_ND, id_ND)
    operand = problem.backend.operand_dtype or dtype
    content_ND, id_ND = content_ND.to(operand), id_ND.to(operand)
    weight_M, q_M = problem.weight_M.to(dtype), problem.q_M.to(dtype)
    peers.share(id_ND)
    pairs = _Pairs(content_ND, weight_M / q_M, scale, problem)

    row_sum_N, column_sum_N = pairs.sums()
    positive_N = (content_ND.to(dtype) * id_ND).sum(1) * scale
    half = 0.5 / weight_M.sum().clamp_min(torch.finfo(dtype).tiny)
    log_odds_2N = torch.stack([row_sum_N, column_sum_N]).log() - positive_N
    # softplus, exact at both ends: F.softplus returns x beyond its threshold, which is not enough for float64
    terms_N = torch.logaddexp(log_odds_2N, torch.zeros_like(log_odds_2N)).sum(0)
    loss = half * (weight_M[own] * terms_N).sum() * peers.world_size
    if not any(peers.wants):
        return _Solution(loss, None, None, None)

    wants = peers.wants._replace(content=peers.wants.content or not peers.wants.id)  # for the scale either side will do
    u_N, v_N = half * q_M[own] / (torch.stack([row_sum_N, column_sum_N]) + positive_N.exp())
    d_content_ND, d_id_ND = pairs.gradients(u_N, v_N, wants)
    pull_N1 = (half * scale * weight_M[own] * log_odds_2N.sigmoid().sum(0))[:, None]
    if d_content_ND is not None:
        d_content_ND = (d_content_ND - pull_N1 * id_ND) * peers.world_size
    if d_id_ND is not None:
        d_id_ND = (d_id_ND - pull_N1 * content_ND) * peers.world_size
    d_scale = _slope_of_scale(d_content_ND, content_ND) if wants.content else _slope_of_scale(d_id_ND, id_ND)
    return _Solution(loss, d_content_ND, d_id_ND, d_scale / scale)


def _slope_of_scale(gradient_ND: Tensor | None, vector_ND: Tensor) -> Tensor:
    """Return scale * d loss / d scale: the loss depends on the product of the scale and either side."""
    assert gradient_ND is not None
    return (gradient_ND * vector_ND).sum()


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
    content_ND: Tensor,
    id_ND: Tensor,
    scale: Tensor,
    peers: Alone,
    weight_M: Tensor,
    q_M: Tensor,
    backend: BackendName = "auto",
    tile: int = 0,
) -> Tensor:
    """Return this process's share of the symmetric InfoNCE loss over the items of all processes.

    Args:
        content_ND: Content of this process's items, L2-normalised, ordered as `peers.own`.
        id_ND: ID embeddings of the same items, L2-normalised.
        scale: 1 / temperature, scalar, the same on all processes.
        peers: The other processes.
        weight_M: Weight of every column as a row of the loss.
        q_M: Over-representation of every column as a negative; 1 means none.
        backend: Who goes through the grid, see `choose_backend`.
        tile: Rows and columns of a tile of the backend `tiled`; 0 picks for the device.

    Returns:
        Scalar whose mean over the processes is the loss; float64 if an input is, else float32. Its gradients are
        `peers.world_size` times those of the loss, so that parameter gradients averaged over processes are right too.

    Raises:
        NumericError: If the scale is not finite.
        ConfigError: If the scale is not positive or beyond LARGEST_SCALE, or the backend cannot do it.
    """
    value = float(scale.detach())
    if not math.isfinite(value):
        raise NumericError(f"contrastive loss: scale (1 / temperature) is {value}; the learnt temperature has diverged")
    if not 0 < value <= LARGEST_SCALE * ROUNDING:
        raise ConfigError(
            f"contrastive loss: scale {value:g} is outside (0, {LARGEST_SCALE:g}]; "
            f"use a temperature of at least {1 / LARGEST_SCALE:.4f}"
        )
    problem = _Problem(peers, weight_M, q_M, choose_backend(backend, content_ND, id_ND, tile))
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


def info_nce(
    content_ND: Tensor,
    id_ND: Tensor,
    item_N: Tensor,
    scale: Tensor | float,
    *,
    weight_N: Tensor | None = None,
    log_q_N: Tensor | None = None,
    backend: BackendName = "auto",
    tile: int = 0,
) -> Tensor:
    """Return the symmetric InfoNCE loss of one process, exactly, without the N x N matrix.

    Pairs of rows with the same item are never negatives of each other. A row of weight k counts like k equal rows.

    Args:
        content_ND: Content vectors, any float type, L2-normalised: |s| <= scale is what keeps the sums finite.
        id_ND: ID vectors of the same items, L2-normalised.
        item_N: Catalogue rows, int64, in any order, repeats allowed.
        scale: 1 / temperature, in (0, 300]; a scalar tensor may require a gradient. Above 40, sums are float64.
        weight_N: Weight of each row in the loss and as a negative; 1 if None.
        log_q_N: Subtracted from the logits of the row where it is a negative (log-popularity correction); 0 if None.
        backend: Who goes through the grid, see `choose_backend`.
        tile: Rows and columns of a tile of the backend `tiled`; 0 picks for the device.

    Returns:
        Scalar in nats, the weighted mean over rows and both directions; exactly 0 where there are no two different
        items. It can be differentiated once.

    Raises:
        ValueError: If the shapes disagree or the items are not int64.
        NumericError: If the scale is not finite.
        ConfigError: If the scale is not positive or above 300, or the backend cannot do it.
    """
    check_shapes(content_ND, id_ND, item_N)
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float64 if content_ND.device.type == "cpu" else torch.float32)
    order_N = torch.argsort(item_N, stable=True)
    ones_N = torch.ones_like(item_N, dtype=torch.float32)
    weight_N = ones_N if weight_N is None else weight_N[order_N]
    q_N = ones_N if log_q_N is None else log_q_N.exp()[order_N]
    peers = Alone(item_N[order_N], wants_of(content_ND, id_ND, scale))
    return contrast(content_ND[order_N], id_ND[order_N], scale, peers, weight_N, q_N, backend, tile)
