"""A point that no gradient passes, where DistributedDataParallel waits for one."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["stop_gradient"]


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return the value unchanged."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return a gradient of zero."""
        return torch.zeros_like(gradient)


def stop_gradient(value: Tensor) -> Tensor:
    """Return `value` such that what it was made of gets a gradient of zero from here.

    `Tensor.detach` would give none, and DistributedDataParallel refuses parameters without.
    """
    stopped: Tensor = _Stop.apply(value)  # type: ignore[no-untyped-call]
    return stopped
