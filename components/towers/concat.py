"""The plain content tower that the Fusion-Q-Former must beat: mean of each modality, concatenated into an MLP.

Shape letters: U items, I width of a token, M modalities, D width of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.towers.tokens import inverse_rms, masked_mean
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import TOWERS

__all__ = ["ConcatTower", "ConcatTowerOptions"]


@dataclass(frozen=True, kw_only=True)
class ConcatTowerOptions:
    """Options of the content tower `concat`."""

    hidden: tuple[int, ...] = (128,)
    """Widths of the hidden layers of the MLP over the concatenated modalities."""
    dropout: float = 0.0
    """Dropout rate after each hidden layer, in [0, 1)."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden of the concat tower is {self.hidden}, every width must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of the concat tower is {self.dropout}, must be in [0, 1)")


@TOWERS.register("concat", options=ConcatTowerOptions)
class ConcatTower(nn.Module):
    """Mean of the valid tokens of each modality, projected to D, concatenated, and through an MLP to D.

    A modality that an item lacks is a learned vector, not zeros that look like data. Source: [ours], a baseline.

    Args:
        options: See `ConcatTowerOptions`.
        token_dims: Width of a token by modality.
        token_counts: Not needed here; part of the interface of towers.
        width: D.

    Raises:
        ConfigError: If there is no modality.
    """

    def __init__(
        self, options: ConcatTowerOptions, token_dims: Mapping[str, int], token_counts: Mapping[str, int], width: int
    ) -> None:
        super().__init__()
        if not token_dims:
            raise ConfigError("the concat tower needs at least one modality, and the data has none")
        self.project = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in token_dims.items()})
        self.missing = nn.ParameterDict({name: torch.empty(width).normal_(std=0.02) for name in token_dims})
        layers: list[nn.Module] = []
        incoming = len(token_dims) * width
        for outgoing in options.hidden:
            layers += [nn.Linear(incoming, outgoing), nn.SiLU(), nn.Dropout(options.dropout)]
            incoming = outgoing
        self.mlp = nn.Sequential(*layers, nn.Linear(incoming, width))

    def forward(self, tokens: Mapping[str, ModalityTokens]) -> Tensor:
        """Return content_UD from the tokens of the same U items, all modalities the tower was built for."""
        parts = []
        for name, project in self.project.items():
            mean_UI = masked_mean(tokens[name])
            norm_U1 = torch.linalg.vector_norm(mean_UI, dim=1, keepdim=True)
            projected_UD = project(mean_UI * inverse_rms(norm_U1, mean_UI.shape[1]))
            present_U1 = tokens[name].valid_UT.any(1, keepdim=True)
            parts.append(torch.where(present_U1, projected_UD, self.missing[name]))
        return self.mlp(torch.cat(parts, dim=1))
