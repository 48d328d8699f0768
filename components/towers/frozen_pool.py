"""The two-stage baseline: what the frozen encoders say, pooled and concatenated, with nothing of it trained.

Shape letters: U items, I width of a token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.towers.tokens import inverse_rms, masked_mean
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import TOWERS, NoOptions

__all__ = ["FrozenPoolTower"]


@TOWERS.register("frozen_pool")
class FrozenPoolTower(nn.Module):
    """Mean of the valid tokens of each modality, brought to a root mean square of 1, and concatenated.

    A modality that an item lacks is zeros, and behind each modality stands 1 if the item has it, else 0. There is no
    parameter: the ranker's own linear map from here to D is the first thing that is trained, as in a pipeline that
    extracts embeddings first and feeds them to the ranker. Source: [ours], a baseline.

    Args:
        options: None.
        token_dims: Width of a token by modality.
        token_counts: Not needed here; part of the interface of towers.
        width: Not needed here; the output is as wide as the modalities and their flags together.

    Raises:
        ConfigError: If there is no modality.
    """

    def __init__(
        self, options: NoOptions, token_dims: Mapping[str, int], token_counts: Mapping[str, int], width: int
    ) -> None:
        super().__init__()
        if not token_dims:
            raise ConfigError("the frozen_pool tower needs at least one modality, and the data has none")
        self.modalities = tuple(token_dims)
        self.output_width = sum(token_dims.values()) + len(token_dims)

    def forward(self, tokens: Mapping[str, ModalityTokens]) -> Tensor:
        """Return the concatenation [U, output_width] of the same U items, all modalities the tower was built for."""
        parts = []
        for name in self.modalities:
            mean_UI = masked_mean(tokens[name])
            norm_U1 = torch.linalg.vector_norm(mean_UI, dim=1, keepdim=True)
            present_U1 = tokens[name].valid_UT.any(1, keepdim=True)
            parts += [mean_UI * inverse_rms(norm_U1, mean_UI.shape[1]), present_U1.to(mean_UI.dtype)]
        return torch.cat(parts, dim=1)
