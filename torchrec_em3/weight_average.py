"""A running average of the dense weights, which ranks more steadily than the weights of any one step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["WeightAverage"]

WARM_UP = 10
"""Steps n count with decay (1 + n) / (WARM_UP + n) at most, so that the initial weights are soon forgotten."""


class WeightAverage:
    """Exponential moving average of the dense parameters; tables stay out, a step changes few of their rows."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Start at the current values.

        Args:
            parameters: Dense parameters by name, equal on every rank; kept, not copied.
            decay: Weight of the old average in each step, in [0, 1); 0 follows the parameters.
        """
        self._parameters = [parameter.data for parameter in parameters.values()]
        self._average = [parameter.clone() for parameter in self._parameters]
        self._names = list(parameters)
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (WARM_UP + step))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the parameters for their average meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        current = [parameter.clone() for parameter in self._parameters]
        self.apply()
        torch._foreach_copy_(self._average, current)

    @torch.no_grad()
    def apply(self) -> None:
        """Overwrite the parameters with their average."""
        torch._foreach_copy_(self._parameters, self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name; the tensors are the average's own."""
        return dict(zip(self._names, self._average, strict=True))
