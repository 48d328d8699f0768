"""A model that does not fit into the memory of a rank, told so in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchrec_em3.errors import ConfigError
from torchrec_em3.number_format import size
from torchrec_em3.plan_budget import model_budget

__all__ = ["room_for_shards"]

NO_MEMORY = "can't allocate memory"
"""What PyTorch's allocator says on a CPU, in a plain RuntimeError."""


@contextmanager
def room_for_shards(model: nn.Module, world_size: int) -> Iterator[None]:
    """Within, a lack of memory for this rank's shards is a ConfigError.

    The planner compares plans with the machine's memory; a limit on the process, or what else the machine does, shows
    only when the memory is asked for.

    Args:
        model: The model before it is sharded.
        world_size: Ranks that it is sharded over.

    Raises:
        ConfigError: If this rank's share of tables and content bank cannot be allocated.
    """
    budget = model_budget(model, world_size)
    try:
        yield
    except RuntimeError as error:
        if NO_MEMORY not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"no memory on a rank for its shards of tables and content bank; the bank takes {size(budget.bank_bytes)} "
            f"on each of {world_size} ranks; start more ranks, lower --model.embedding_dim or raise the limit of memory"
        ) from error
