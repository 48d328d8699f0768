"""The count of steps that fused optimizers keep for themselves: Adam corrects its moments by it.

fbgemm leaves it out of the optimizers' state, so a training that goes on would take its first steps too short.
"""

from collections.abc import Iterator
from typing import Any

from torchrec_em3.process_group import Ranks
from torchrec_em3.sharding import ShardedModel

__all__ = ["set_table_steps", "table_steps"]


def table_steps(sharded: ShardedModel, ranks: Ranks) -> int:
    """Return how many steps the tables' optimizers have counted, on rank 0; 0 elsewhere. Collective.

    All count the same; a rank without a table counts none.
    """
    counted = ranks.gather(max(map(int, _counters(sharded.module.fused_optimizer)), default=0))
    return max(counted) if counted is not None else 0


def set_table_steps(sharded: ShardedModel, steps: int) -> None:
    """Let the tables' optimizers go on counting from there."""
    sharded.module.fused_optimizer.set_optimizer_step(steps)


def _counters(optimizer: Any) -> Iterator[Any]:
    for _, part in getattr(optimizer, "optimizers", ()):
        yield from _counters(part)
    # TorchRec has a way to set it and none to read it.
    if kernel := getattr(optimizer, "_emb_module", None):
        yield kernel.iter
