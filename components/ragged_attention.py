"""Attention over ragged histories: one score a position, weights by row, weighted sums of shared keys.

Keys are stored once per distinct item and read by index; no [positions, width] tensor is ever stored. Scored by a dot
product, each pass over the positions is an embedding-bag kernel. Scored by an MLP, the positions run in chunks that
stay in the processor's cache, and the backward pass computes a chunk again rather than keep it.

Shape letters: B rows, V distinct history items, N history positions of all rows, C positions of one chunk, D width of a
key, H width of the first hidden layer, S = D + H.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["Ragged", "attend_by_dot_product", "attend_by_mlp", "ragged_dot_products"]

NEGATIVE_SLOPE = 0.25
"""Where DIN's PReLU starts; held fixed, since training it costs one more pass over the positions per layer."""
CPU_CHUNK = 4096
"""Positions at a time on a CPU: a few buffers of this many rows fit the second-level cache."""


class Ragged(NamedTuple):
    """Which keys each row attends to.

    Attributes:
        row_N: Row of the key that each position holds, int64, the positions of one batch row next to each other.
        lengths_B: Number of positions of each batch row, int64; sums to N.
    """

    row_N: Tensor
    lengths_B: Tensor


def attend_by_dot_product(query_BD: Tensor, key_VD: Tensor, ragged: Ragged) -> Tensor:
    """Return interest_BD, each row's keys weighted by the softmax of query . key; zeros for a row without positions.

    Args:
        query_BD: Query of each row.
        key_VD: Keys, finite.
        ragged: Which keys each row attends to.
    """
    attend: Callable[..., Tensor] = _DotProductAttention.apply
    return attend(query_BD, key_VD, *ragged)


def attend_by_mlp(
    query_BS: Tensor, key_VS: Tensor, product_HD: Tensor, deeper: Sequence[Tensor], ragged: Ragged
) -> Tensor:
    """Return interest_BD, each row's keys weighted by the softmax of an MLP; zeros for a row without positions.

    The first hidden layer of a position is q[D:] + k[D:] + product_HD (q[:D] * k[:D]), of its query q and its key k.

    Args:
        query_BS: Query of each row, and its share of the first hidden layer, bias included.
        key_VS: Keys, and their share of the first hidden layer; finite.
        product_HD: Weight of the products in the first hidden layer.
        deeper: Weight and bias of each further layer, in turn; the last layer has no bias.
        ragged: Which keys each row attends to.
    """
    attend: Callable[..., Tensor] = _MlpAttention.apply
    return attend(query_BS, key_VS, product_HD, *ragged, *deeper)


def ragged_dot_products(query_BD: Tensor, key_VD: Tensor, ragged: Ragged) -> Tensor:
    """Return query . key of each position, score_N; the gradient reaches the queries alone.

    Args:
        query_BD: Query of each row.
        key_VD: Keys, finite.
        ragged: Which keys each row meets.
    """
    multiply: Callable[..., Tensor] = _DotProducts.apply
    return multiply(query_BD, key_VD, *ragged)


class _DotProducts(torch.autograd.Function):
    """Dot products whose pass over the positions is an embedding-bag kernel in both directions."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, key_VD: Tensor, row_N: Tensor, lengths_B: Tensor) -> Tensor:
        batch_N = torch.repeat_interleave(lengths_B, output_size=row_N.numel())
        starts_B = lengths_B.cumsum(0) - lengths_B
        key_VD = key_VD.contiguous()
        ctx.save_for_backward(key_VD, row_N, starts_B)
        return _dot_products(query_BD.contiguous(), key_VD, row_N, starts_B, batch_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        key_VD, row_N, starts_B = ctx.saved_tensors
        return _weighted_sums(key_VD, row_N, starts_B, grad_N.contiguous()), None, None, None


class _DotProductAttention(torch.autograd.Function):
    """Attention whose every pass over the positions is an embedding-bag kernel."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, key_VD: Tensor, row_N: Tensor, lengths_B: Tensor) -> Tensor:
        batch_N = torch.repeat_interleave(lengths_B, output_size=row_N.numel())
        starts_B = lengths_B.cumsum(0) - lengths_B
        query_BD, key_VD = query_BD.contiguous(), key_VD.contiguous()
        score_N = _dot_products(query_BD, key_VD, row_N, starts_B, batch_N)
        weight_N = _softmax(score_N, batch_N, lengths_B)
        interest_BD = _weighted_sums(key_VD, row_N, starts_B, weight_N)
        ctx.save_for_backward(query_BD, key_VD, row_N, batch_N, starts_B, weight_N, interest_BD)
        return interest_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, key_VD, row_N, batch_N, starts_B, weight_N, interest_BD = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        mean_B = (grad_BD * interest_BD).sum(1)
        grad_score_N = _dot_products(grad_BD, key_VD, row_N, starts_B, batch_N)
        grad_score_N.sub_(mean_B.index_select(0, batch_N)).mul_(weight_N)
        grad_query_BD = _weighted_sums(key_VD, row_N, starts_B, grad_score_N)
        if not ctx.needs_input_grad[1]:
            return grad_query_BD, None, None, None
        # Seen from a key, the rows that attend to it are its bag.
        order_N = row_N.argsort(stable=True)
        count_V = torch.bincount(row_N, minlength=len(key_VD))
        starts_V = count_V.cumsum(0) - count_V
        grad_key_VD = _weighted_sums(query_BD, batch_N[order_N], starts_V, grad_score_N[order_N])
        grad_key_VD += _weighted_sums(grad_BD, batch_N[order_N], starts_V, weight_N[order_N])
        return grad_query_BD, grad_key_VD, None, None


def _weighted_sums(row_XD: Tensor, index_N: Tensor, starts: Tensor, weight_N: Tensor) -> Tensor:
    """Return the weighted sum of the indexed rows of each bag."""
    return functional.embedding_bag(index_N, row_XD, starts, mode="sum", per_sample_weights=weight_N)


def _dot_products(query_BD: Tensor, key_VD: Tensor, row_N: Tensor, starts_B: Tensor, batch_N: Tensor) -> Tensor:
    """Return each position's dot product of query and key: what an embedding bag computes for its weights' gradient."""
    mode_sum, no_padding = 0, -1
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        query_BD, key_VD, row_N, starts_B, batch_N, mode_sum, no_padding
    )


class _MlpAttention(torch.autograd.Function):
    """Attention by an MLP, a chunk of positions at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BS: Tensor,
        key_VS: Tensor,
        product_HD: Tensor,
        row_N: Tensor,
        lengths_B: Tensor,
        *deeper: Tensor,
    ) -> Tensor:
        width = product_HD.shape[1]
        batch_N = torch.repeat_interleave(lengths_B, output_size=row_N.numel())
        score_N = query_BS.new_empty(row_N.numel())
        for part, query_CS, key_CS in _chunks(query_BS, key_VS, batch_N, row_N):
            product_CD = query_CS[:, :width].mul_(key_CS[:, :width])
            hidden_CH = key_CS[:, width:].add_(query_CS[:, width:]).addmm_(product_CD, product_HD.t())
            score_N[part] = _mlp(hidden_CH, deeper)[-1].squeeze(1)
        weight_N = _softmax(score_N, batch_N, lengths_B)
        starts_B = lengths_B.cumsum(0) - lengths_B
        key_VD = key_VS[:, :width].contiguous()
        interest_BD = _weighted_sums(key_VD, row_N, starts_B, weight_N)
        ctx.save_for_backward(query_BS, key_VS, product_HD, row_N, batch_N, weight_N, interest_BD, *deeper)
        return interest_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        query_BS, key_VS, product_HD, row_N, batch_N, weight_N, interest_BD, *deeper = ctx.saved_tensors
        width = product_HD.shape[1]
        mean_B = (grad_BD * interest_BD).sum(1)
        inputs = (query_BS, key_VS, product_HD, *deeper)
        grad_query_BS, grad_key_VS, grad_product_HD, *grad_deeper = grads = [torch.zeros_like(x) for x in inputs]
        for part, query_CS, key_CS in _chunks(query_BS, key_VS, batch_N, row_N):
            batch_C, weight_C = batch_N[part], weight_N[part]
            grad_CD = grad_BD.index_select(0, batch_C)
            grad_weight_C = (grad_CD * key_CS[:, :width]).sum(1)
            grad_score_C = grad_weight_C.sub_(mean_B.index_select(0, batch_C)).mul_(weight_C)
            product_CD = query_CS[:, :width] * key_CS[:, :width]
            hidden_CH = (query_CS[:, width:] + key_CS[:, width:]).addmm_(product_CD, product_HD.t())
            layers = _mlp(hidden_CH, deeper)
            grad_hidden_CH = _mlp_backward(grad_score_C[:, None], layers, deeper, grad_deeper)
            grad_product_HD.addmm_(grad_hidden_CH.t(), product_CD)
            grad_product_CD = torch.mm(grad_hidden_CH, product_HD, out=product_CD)
            # A product's gradient is the other factor's: each side's buffer becomes the gradient of the other side.
            key_CS[:, :width].mul_(grad_product_CD)
            query_CS[:, :width].mul_(grad_product_CD).addcmul_(grad_CD, weight_C[:, None])
            key_CS[:, width:] = query_CS[:, width:] = grad_hidden_CH
            grad_query_BS.index_add_(0, batch_C, key_CS)
            grad_key_VS.index_add_(0, row_N[part], query_CS)
        return *grads[:3], None, None, *grad_deeper


def _chunks(query_BS: Tensor, key_VS: Tensor, batch_N: Tensor, row_N: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk of positions with the query's and the key's side of it, in two buffers that are used again."""
    positions = row_N.numel()
    chunk = min(positions, CPU_CHUNK) if row_N.device.type == "cpu" else positions
    query_CS, key_CS = query_BS.new_empty(2, chunk, query_BS.shape[1])
    for start in range(0, positions, max(chunk, 1)):
        part = slice(start, min(start + chunk, positions))
        size = part.stop - start
        torch.index_select(query_BS, 0, batch_N[part], out=query_CS[:size])
        torch.index_select(key_VS, 0, row_N[part], out=key_CS[:size])
        yield part, query_CS[:size], key_CS[:size]


def _softmax(score_N: Tensor, batch_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Return softmax of the scores within each batch row."""
    largest_B = torch.segment_reduce(score_N, "max", lengths=lengths_B, unsafe=True)
    score_N = score_N.sub_(largest_B.index_select(0, batch_N)).exp_()
    total_B = largest_B.zero_().index_add_(0, batch_N, score_N)
    return score_N.div_(total_B.index_select(0, batch_N))


def _mlp(hidden_CH: Tensor, deeper: Sequence[Tensor]) -> list[Tensor]:
    """Return the input of each deeper layer (overwriting `hidden_CH`) and, last, the scores [C, 1]."""
    outputs = [hidden_CH]
    for weight, bias in _layers(deeper):
        functional.leaky_relu_(outputs[-1], NEGATIVE_SLOPE)
        outputs.append(functional.linear(outputs[-1], weight, bias))
    return outputs


def _mlp_backward(
    grad_C1: Tensor, outputs: Sequence[Tensor], deeper: Sequence[Tensor], grad_deeper: Sequence[Tensor]
) -> Tensor:
    """Add the deeper layers' gradients to `grad_deeper`; return that of the first hidden layer."""
    grad = grad_C1
    layers = zip(outputs[:-1], _layers(deeper), _layers(grad_deeper), strict=True)
    for activated, (weight, _), (grad_weight, grad_bias) in reversed(list(layers)):
        grad_weight.addmm_(grad.t(), activated)
        if grad_bias is not None:
            grad_bias.add_(grad.sum(0))
        grad = torch.ops.aten.leaky_relu_backward(grad @ weight, activated, NEGATIVE_SLOPE, True)
    return grad


def _layers(deeper: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Group the flat parameters into (weight, bias) of each layer; the last layer has no bias."""
    biases = [*deeper[1::2], None]
    return list(zip(deeper[::2], biases, strict=False))
