"""What a user's history says about one candidate: DIN target attention over ragged histories, without padding.

DIN scores each history position with an MLP on [query, key, query - key, query * key] and sums the keys by the scores.
Here the first layer of that MLP is folded: W [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k). The first
term is computed once per row, the second once per distinct item, and only the third per position. Without a hidden
layer the whole score is one dot product, (w + p * q) . k: what depends on q alone cancels in the softmax.

Shape letters: B rows, V distinct history items, N history positions of all rows, D width, H width of the first hidden
layer, S = D + H.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.ragged_attention import Ragged, attend_by_dot_product, attend_by_mlp
from torchrec_em3.errors import ConfigError

__all__ = ["LinearTargetAttention", "TargetAttention", "only_valid", "target_attention"]


def target_attention(width: int, hidden: Sequence[int]) -> nn.Module:
    """Return the attention of this width whose scoring MLP has these hidden layers; none scores linearly."""
    return TargetAttention(width, hidden) if hidden else LinearTargetAttention(width)


class TargetAttention(nn.Module):
    """Pools each row's history into one vector, weighted by how much each item matters to the row's target.

    Source: attention of the DIN kind over content and ID histories, its softmax, its folded and ragged form and the
    leaky ReLU are [ours]; which ranker's attention EM3 itself used is not public.

    Args:
        width: Width D of the target's vector, of the history items' and of the result.
        hidden: Widths of the hidden layers of the scoring MLP, at least one.

    Raises:
        ConfigError: If a width is not positive or there is no hidden layer.
    """

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        if not hidden or min(width, *hidden) < 1:
            raise ConfigError(f"widths of the history attention are {(width, *hidden)}, must be two or more, all >= 1")
        widths = [*hidden, 1]
        self.first = nn.Linear(4 * width, widths[0])
        layers = enumerate(itertools.pairwise(widths), start=1)
        self.deeper = nn.ModuleList(nn.Linear(a, b, bias=depth < len(hidden)) for depth, (a, b) in layers)

    def forward(self, query_BD: Tensor, history: HistoryItems, row_N: Tensor, lengths_B: Tensor) -> Tensor:
        """Return interest_BD; zeros for a row whose history is empty or holds no valid item.

        Args:
            query_BD: The target's vector of each row, float.
            history: The distinct history items.
            row_N: Item that each position holds, int64, the positions of one batch row next to each other.
            lengths_B: Number of positions of each batch row, int64; sums to N.
        """
        history, ragged = only_valid(history, row_N, lengths_B)
        key_VD = history.content()
        of_query, of_key, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        query_BH = functional.linear(query_BD, of_query + of_difference, self.first.bias)
        query_BS = torch.cat([query_BD, query_BH], dim=1)
        key_VS = torch.cat([key_VD, functional.linear(key_VD, of_key - of_difference)], dim=1)
        return attend_by_mlp(query_BS, key_VS, of_product, list(self.deeper.parameters()), ragged)


class LinearTargetAttention(nn.Module):
    """Target attention without a hidden layer: a fifth of the cost, and none of it grows with the items' linear map.

    Where the items' content is a linear map of stored rows, the map is applied to the queries and to the weighted sums,
    B rows each, and not to the V items: the same result, since scoring and summing are linear. Source: [ours].

    Args:
        width: Width D of the target's vector, of the history items' and of the result.

    Raises:
        ConfigError: If `width` is not positive.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"width of the history attention is {width}, must be >= 1")
        self.score = nn.Linear(2 * width, 1, bias=False)

    def forward(self, query_BD: Tensor, history: HistoryItems, row_N: Tensor, lengths_B: Tensor) -> Tensor:
        """Return interest_BD; see `TargetAttention.forward`."""
        history, ragged = only_valid(history, row_N, lengths_B)
        of_key_D, of_product_D = self.score.weight[0].chunk(2)
        query_BD = torch.addcmul(of_key_D, query_BD, of_product_D)
        if history.weight_DD is None:
            return attend_by_dot_product(query_BD, history.rows_VD, ragged)
        pooled_BD = attend_by_dot_product(query_BD @ history.weight_DD, history.rows_VD, ragged)
        interest_BD = functional.linear(pooled_BD, history.weight_DD, history.bias_D)
        return interest_BD * (ragged.lengths_B > 0)[:, None]


def only_valid(history: HistoryItems, row_N: Tensor, lengths_B: Tensor) -> tuple[HistoryItems, Ragged]:
    """Return the history without the positions whose item is not valid, and with zeros in the rows of those items."""
    valid_V, lengths_B = history.valid_V, lengths_B.to(row_N.dtype)
    if valid_V is None or bool(valid_V.all()):
        return history, Ragged(row_N, lengths_B)
    keep_N = valid_V.index_select(0, row_N)
    kept_before = functional.pad(keep_N.cumsum(0), (1, 0))
    ends_B = lengths_B.cumsum(0)
    ragged = Ragged(row_N[keep_N], kept_before[ends_B] - kept_before[ends_B - lengths_B])
    return history._replace(rows_VD=history.rows_VD.masked_fill(~valid_V[:, None], 0.0)), ragged
