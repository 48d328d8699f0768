"""What a user's history says about one candidate: DIN target attention over ragged histories, without padding.

DIN scores each history position with an MLP on [query, key, query - key, query * key] and sums the keys by the scores.
Here the first layer of that MLP is folded: W [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k). The first
term is computed once per row, the second once per distinct item, and only the third per position. The work per position
runs in chunks that stay in the processor's cache, and the backward pass computes a chunk again rather than keep it, so
no [positions, width] tensor is ever stored.

Shape letters: B rows, V distinct history items, N history positions of all rows, C positions of one chunk, D width of a
key, H width of the first hidden layer, S = D + H.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from torchrec_em3.errors import ConfigError

__all__ = ["TargetAttention"]

NEGATIVE_SLOPE = 0.25
"""Where DIN's PReLU starts; held fixed, since training it costs one more pass over the positions per layer."""
CPU_CHUNK = 4096
"""Positions at a time on a CPU: a few buffers of this many rows fit the second-level cache."""


class TargetAttention(nn.Module):
    """Pools each row's history into one vector, weighted by how much each item matters to the row's target.

    Source: attention of the DIN kind over content and ID histories, its folded and ragged form and the leaky ReLU are
    [ours]; which ranker's attention EM3 itself used is not public.

    Args:
        query_dim: Width of the target's vector. Where it differs from `key_dim` the query is first mapped to `key_dim`.
        key_dim: Width D of the history items' vectors and of the result.
        hidden: Widths of the hidden layers of the scoring MLP; empty scores linearly, at less than half the cost.
        normalize: "softmax" makes the weights of a row sum to one; "none" uses scores / sqrt(D) as they are, so that
            more matching items give a longer vector.

    Raises:
        ConfigError: If a width is not positive or `normalize` is unknown.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden: Sequence[int] = (32,),
        normalize: Literal["softmax", "none"] = "softmax",
    ) -> None:
        super().__init__()
        if min(query_dim, key_dim, *hidden) < 1:
            raise ConfigError(f"widths of the history attention must be >= 1, not {(query_dim, key_dim, *hidden)}")
        if normalize not in ("softmax", "none"):
            raise ConfigError(f"normalize of the history attention must be 'softmax' or 'none', not '{normalize}'")
        widths = [*hidden, 1]
        self.normalize = normalize
        self.align = nn.Identity() if query_dim == key_dim else nn.Linear(query_dim, key_dim, bias=False)
        self.first = nn.Linear(4 * key_dim, widths[0])
        layers = enumerate(itertools.pairwise(widths), start=1)
        self.deeper = nn.ModuleList(nn.Linear(a, b, bias=depth < len(hidden)) for depth, (a, b) in layers)

    def forward(
        self, query_BD: Tensor, key_VD: Tensor, row_N: Tensor, lengths_B: Tensor, valid_V: Tensor | None = None
    ) -> Tensor:
        """Return interest_BD; zeros for a row whose history is empty or holds no valid item.

        Args:
            query_BD: The target's vector of each row, float.
            key_VD: Vectors of the distinct history items, float.
            row_N: Row of `key_VD` that each position holds, int64, the positions of one batch row next to each other.
            lengths_B: Number of positions of each batch row, int64; sums to N.
            valid_V: False for items to leave out, whatever their vector holds; None means that all are valid.
        """
        if valid_V is not None and not bool(valid_V.all()):
            key_VD = key_VD.masked_fill(~valid_V[:, None], 0.0)
            row_N, lengths_B = _drop_invalid(row_N, lengths_B, valid_V)
        query_BD = self.align(query_BD)
        of_query, of_key, of_difference, of_product_HD = self.first.weight.chunk(4, dim=1)
        query_BS = torch.cat([query_BD, functional.linear(query_BD, of_query + of_difference, self.first.bias)], dim=1)
        key_VS = torch.cat([key_VD, functional.linear(key_VD, of_key - of_difference)], dim=1)
        softmax, deeper = self.normalize == "softmax", self.deeper.parameters()
        pool: Callable[..., Tensor] = _RaggedAttention.apply
        return pool(softmax, query_BS, key_VS, of_product_HD, row_N, lengths_B, *deeper)


def _drop_invalid(row_N: Tensor, lengths_B: Tensor, valid_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions whose item is valid, and the number that each batch row keeps."""
    keep_N = valid_V.index_select(0, row_N)
    kept_before = functional.pad(keep_N.cumsum(0), (1, 0))
    ends_B = lengths_B.cumsum(0)
    return row_N[keep_N], kept_before[ends_B] - kept_before[ends_B - lengths_B]


class _RaggedAttention(torch.autograd.Function):
    """Attention weights and weighted sum over ragged rows, from the folded halves that `TargetAttention` prepares."""

    @staticmethod
    def forward(
        ctx: Any,
        softmax: bool,
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
        weight_N = _softmax(score_N, batch_N, lengths_B) if softmax else score_N.mul_(width**-0.5)
        starts_B = lengths_B.cumsum(0) - lengths_B
        key_VD = key_VS[:, :width].contiguous()
        interest_BD = functional.embedding_bag(row_N, key_VD, starts_B, mode="sum", per_sample_weights=weight_N)
        ctx.softmax = softmax
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
            if ctx.softmax:
                grad_score_C = grad_weight_C.sub_(mean_B.index_select(0, batch_C)).mul_(weight_C)
            else:
                grad_score_C = grad_weight_C.mul_(width**-0.5)
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
        return None, *grads[:3], None, None, *grad_deeper


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
