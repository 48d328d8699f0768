"""The MLP that rankers share, from their inputs to the logits, and its options.

TorchRec's MLP has no dropout; this one does.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from torchrec_em3.errors import ConfigError

__all__ = ["MLP", "MLPOptions"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "prelu": nn.PReLU}


@dataclass(frozen=True, kw_only=True)
class MLPOptions:
    """Options of the MLP, which the options of a ranker that has one extend."""

    ranker: ClassVar[str]
    """Name of that ranker, for messages."""
    hidden: tuple[int, ...] = (256, 128, 64)
    """Widths of the hidden layers."""
    dropout: float = 0.0
    """Dropout rate after each hidden layer, in [0, 1)."""
    activation: Literal["relu", "silu", "prelu"] = "relu"
    """Activation of the hidden layers."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden of the {self.ranker} ranker is {self.hidden}, every width must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of the {self.ranker} ranker is {self.dropout}, must be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation of the {self.ranker} ranker is '{self.activation}', must be one of "
                f"{', '.join(ACTIVATIONS)}"
            )


class MLP(nn.Sequential):
    """Hidden layers, each a linear map with activation and dropout, and a linear map to a logit for each task."""

    def __init__(self, options: MLPOptions, in_features: int, num_tasks: int) -> None:
        layers: list[nn.Module] = []
        for out_features in options.hidden:
            activation = ACTIVATIONS[options.activation]()
            layers += [nn.Linear(in_features, out_features), activation, nn.Dropout(options.dropout)]
            in_features = out_features
        super().__init__(*layers, nn.Linear(in_features, num_tasks))
