"""Target attention of many candidates over one history: the attention of `interest`, for serving.

Training reads ragged rows, each with its own target, through kernels that torch.export does not take. A request has
one history and many candidates: here the history is mapped once a request and each candidate attends to it, in plain
torch operations and with the parameters of the trained attention. The results agree to rounding.

Shape letters: R requests, K candidates of a request, L history positions of a request, D width, H width of the first
hidden layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.components.interest import LinearTargetAttention, TargetAttention
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.ragged_attention import NEGATIVE_SLOPE

__all__ = ["SharedHistoryAttention"]


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
