"""What content towers do first with the tokens of a modality.

Shape letters: U items, T tokens, I width of a token, D width of the model.
"""

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.attention import Keys

__all__ = ["TokenProjection", "inverse_rms", "masked_mean", "mean_of_valid", "without_filler"]

SMALLEST_RMS = 1e-6
"""Keeps a token of zeros finite."""


class TokenProjection(nn.Module):
    """Maps the tokens of one modality to the width of the model and marks them by modality and position.

    Each token is first brought to a root mean square of 1, so that encoders of any scale meet the same model; the
    factor is applied after the projection, where it is cheaper. Source: projection [authors' code], the rest [ours].

    Args:
        token_dim: Width I of a token.
        token_count: Largest number of tokens of an item.
        width: D.
        bfloat16: Multiply in bfloat16.
    """

    def __init__(self, token_dim: int, token_count: int, width: int, bfloat16: bool) -> None:
        super().__init__()
        self.use_bfloat16 = bfloat16
        self.project = nn.Linear(token_dim, width, bias=False)
        self.modality_D = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.position_TD = nn.Parameter(torch.empty(token_count, width).normal_(std=0.02))

    def forward(self, tokens: ModalityTokens) -> Keys:
        """Return the projected tokens [U, T, D] with their mask; finite everywhere."""
        tokens_UTI, norm_UT1 = without_filler(tokens)
        mark_TD = self.modality_D + self.position_TD[: tokens_UTI.shape[1]]
        scale_UT1 = inverse_rms(norm_UT1, tokens_UTI.shape[2])
        return Keys(torch.addcmul(mark_TD, self._project(tokens_UTI), scale_UT1), tokens.valid_UT)

    def _project(self, tokens: Tensor) -> Tensor:
        """Return the linear map of tokens [..., I], in their own precision."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            projected: Tensor = self.project(tokens)
        return projected.to(tokens.dtype)


def without_filler(tokens: ModalityTokens) -> tuple[Tensor, Tensor]:
    """Return tokens_UTI that may be multiplied by a weight of zero, and their norms [U, T, 1].

    Where an invalid token holds a NaN or an infinity the invalid ones become zeros. Copying all tokens costs about as
    much as projecting them, so it is only done where there is need.
    """
    tokens_UTI, valid_UT = tokens
    norm_UT1 = _norm(tokens_UTI)
    if not bool(torch.isfinite(norm_UT1).all()):
        tokens_UTI = tokens_UTI.masked_fill(~valid_UT[:, :, None], 0.0)
        norm_UT1 = _norm(tokens_UTI)
    return tokens_UTI, norm_UT1


def inverse_rms(norm: Tensor, width: int) -> Tensor:
    """Return the factor that brings vectors of this norm and width to a root mean square of 1."""
    return (norm * width**-0.5).clamp_min(SMALLEST_RMS).reciprocal()


def _norm(vectors: Tensor) -> Tensor:
    """Return the Euclidean norm over the last dimension, kept as [..., 1]."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def masked_mean(tokens: ModalityTokens) -> Tensor:
    """Return the mean of each item's valid tokens, mean_UI; zeros for an item that has none."""
    return mean_of_valid(without_filler(tokens)[0], tokens.valid_UT)


def mean_of_valid(tokens_UTI: Tensor, valid_UT: Tensor) -> Tensor:
    """Return what `masked_mean` does, without its check: all tokens must be finite, invalid ones too."""
    count_U1 = valid_UT.sum(1, keepdim=True).clamp_min(1)
    weight_UT = valid_UT.to(tokens_UTI.dtype) / count_U1
    return torch.bmm(weight_UT[:, None], tokens_UTI).squeeze(1)
