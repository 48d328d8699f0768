"""Many candidates over one history: the attention of `interest` and the features of `similarity`, for serving.

Training reads ragged rows, each with its own target, through kernels that torch.export does not take. A request has
one history and many candidates: here the history is mapped once a request and each candidate attends to it, in plain
torch operations and with the parameters of the trained modules. The results agree to rounding.

Shape letters: R requests, K candidates of a request, L history positions of a request, D width, H width of the first
hidden layer, T tiers, W width of the similarity's block.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.components.interest import LinearTargetAttention, TargetAttention
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.ragged_attention import NEGATIVE_SLOPE
from torchrec_em3.components.similarity import TIERS, ContentSimilarity, tier_of

__all__ = ["SharedHistoryAttention", "SharedHistorySimilarity"]


class SharedHistoryAttention(nn.Module):
    """What each candidate finds in its request's history; the serving form of the attentions in `interest` [ours].

    Args:
        trained: The attention whose parameters to use, of either kind.
        history_map: Weight and bias that make vectors of the history's rows, as in `HistoryItems`; its rows are not
            read. None means that the rows are the vectors.
    """

    weight_DD: Tensor | None
    bias_D: Tensor | None

    def __init__(self, trained: nn.Module, history_map: HistoryItems | None = None) -> None:
        super().__init__()
        self.trained = trained
        self.register_buffer("weight_DD", None if history_map is None else history_map.weight_DD)
        self.register_buffer("bias_D", None if history_map is None else history_map.bias_D)

    def forward(self, query_RKD: Tensor, rows_RLD: Tensor, valid_RL: Tensor) -> Tensor:
        """Return interest_RKD; zeros where no position of the history is valid.

        Args:
            query_RKD: Vectors of the candidates.
            rows_RLD: Rows of the history items, finite also where they are not valid.
            valid_RL: Positions to attend to, bool.
        """
        if isinstance(self.trained, TargetAttention):
            key_RLD = self._mapped(rows_RLD)
            score_RKL = _mlp_scores(self.trained, query_RKD, key_RLD)
            return _weights(score_RKL, valid_RL) @ key_RLD
        assert isinstance(self.trained, LinearTargetAttention)
        of_key_D, of_product_D = self.trained.score.weight[0].chunk(2)
        query_RKD = torch.addcmul(of_key_D, query_RKD, of_product_D)
        if self.weight_DD is not None:
            query_RKD = query_RKD @ self.weight_DD
        pooled_RKD = _weights(query_RKD @ rows_RLD.transpose(1, 2), valid_RL) @ rows_RLD
        return self._mapped(pooled_RKD) * valid_RL.any(1)[:, None, None]

    def _mapped(self, rows_RXD: Tensor) -> Tensor:
        return rows_RXD if self.weight_DD is None else functional.linear(rows_RXD, self.weight_DD, self.bias_D)


def _mlp_scores(trained: TargetAttention, query_RKD: Tensor, key_RLD: Tensor) -> Tensor:
    """Return the scoring MLP's output [R, K, L], its first layer folded as in training."""
    of_query, of_key, of_difference, of_product = trained.first.weight.chunk(4, dim=1)
    query_RKH = functional.linear(query_RKD, of_query + of_difference, trained.first.bias)
    key_RLH = functional.linear(key_RLD, of_key - of_difference)
    # Only this product is one vector a pair; measured on a CPU, it costs less than (Wp * q) k, which stores none.
    hidden_RKLH = functional.linear(query_RKD[:, :, None] * key_RLD[:, None], of_product)
    hidden_RKLH = hidden_RKLH + query_RKH[:, :, None] + key_RLH[:, None]
    for layer in trained.deeper:
        hidden_RKLH = layer(functional.leaky_relu(hidden_RKLH, NEGATIVE_SLOPE))
    return hidden_RKLH.squeeze(3)


def _weights(score_RKL: Tensor, valid_RL: Tensor) -> Tensor:
    """Return the softmax over the valid positions; zeros where none is."""
    valid_R1L = valid_RL[:, None]
    score_RKL = score_RKL.masked_fill(~valid_R1L, torch.finfo(score_RKL.dtype).min)
    return score_RKL.softmax(2) * valid_R1L


class SharedHistorySimilarity(nn.Module):
    """How alike each candidate is to its request's history; the serving form of `ContentSimilarity` [ours].

    Args:
        trained: The similarity whose map to use.
    """

    def __init__(self, trained: ContentSimilarity) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, content_RKD: Tensor, rows_RLD: Tensor, valid_RL: Tensor, length_R: Tensor) -> Tensor:
        """Return the block [R, K, W].

        Args:
            content_RKD: The tower's output for the candidates.
            rows_RLD: Rows of the history items, finite also where they are not valid.
            valid_RL: Positions whose item is valid, bool; none beyond the length.
            length_R: Positions of each history, int64.
        """
        unit_RKD, unit_RLD = (functional.normalize(rows, dim=2) for rows in (content_RKD, rows_RLD))
        cosine_RKL = unit_RKD @ unit_RLD.transpose(1, 2)
        parts = []
        if self.trained.statistics:
            parts.append(_statistics(cosine_RKL, valid_RL, length_R))
        if self.trained.histogram:
            parts.append(_histogram(cosine_RKL, valid_RL))
        return functional.silu(self.trained.project(torch.cat(parts, dim=2)))


def _statistics(cosine_RKL: Tensor, valid_RL: Tensor, length_R: Tensor) -> Tensor:
    """Return mean, largest and last cosine and the share of the positions that are valid, [R, K, 4]."""
    count_R, valid_R1L = valid_RL.sum(1), valid_RL[:, None]
    any_R1 = (count_R > 0)[:, None]
    mean_RK = torch.where(valid_R1L, cosine_RKL, 0.0).sum(2) / count_R.clamp_min(1)[:, None]
    largest_RK = torch.where(valid_R1L, cosine_RKL, -2.0).amax(2)
    place_L = torch.arange(valid_RL.shape[1], device=valid_RL.device)
    # Not take_along_dim, which torch.export takes for one number of requests and candidates only.
    is_last_RL = place_L == (place_L * valid_RL).amax(1, keepdim=True)
    last_RK = torch.where(is_last_RL[:, None], cosine_RKL, 0.0).sum(2)
    share_RK = (count_R / length_R.clamp_min(1))[:, None].expand_as(mean_RK)
    largest_RK, last_RK = (torch.where(any_R1, each_RK, 0.0) for each_RK in (largest_RK, last_RK))
    return torch.stack([mean_RK, largest_RK, last_RK, share_RK], dim=2)


def _histogram(cosine_RKL: Tensor, valid_RL: Tensor) -> Tensor:
    """Return log(1 + count) of the valid positions' cosines in each tier, [R, K, T]."""
    valid_RKL = valid_RL[:, None].expand_as(cosine_RKL).to(cosine_RKL.dtype)
    zero_RKT = cosine_RKL.new_zeros(*cosine_RKL.shape[:2], TIERS)
    return zero_RKT.scatter_add(2, tier_of(cosine_RKL), valid_RKL).log1p()
