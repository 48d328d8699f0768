"""A model that does not fit into the memory of a rank, told so in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torchrec.modules.tensor_pool import TensorPool

from torchrec_em3.errors import ConfigError
from torchrec_em3.number_format import size
from torchrec_em3.plan_budget import model_budget

__all__ = ["check_bank_split", "room_for_shards"]

NO_MEMORY = "can't allocate memory"
"""What PyTorch's allocator says on a CPU, in a plain RuntimeError."""


def check_bank_split(model: nn.Module, world_size: int) -> None:
    """Refuse a content bank of which TorchRec would give the last rank fewer rows than none.

    Raises:
        ConfigError: If the blocks of the ranks before it hold more rows than there are.
    """
    for rows in (module.pool_size for module in model.modules() if isinstance(module, TensorPool)):
        block = -(-rows // world_size)
        if block * (world_size - 1) > rows:
            raise ConfigError(
                f"the content bank of {rows} rows cannot be split over {world_size} ranks, in blocks of {block}; use "
                f"{-(-rows // block)} ranks at most, or --model.history none --model.encode_fraction 1"
            )


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
