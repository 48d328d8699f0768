"""The tasks of a model: the ranker that has a logit for each, and how much each counts in the loss."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torchrec_em3.config import ModelConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.parts import build_part
from torchrec_em3.registry import RANKERS, closest

__all__ = ["build_ranker", "task_weights"]


def build_ranker(options: ModelConfig, block_dims: Mapping[str, int], tasks: Sequence[str]) -> Any:
    """Return the ranker that the options name, with one logit for each task.

    Args:
        options: Name and options of the ranker.
        block_dims: Width of each block.
        tasks: Names of the tasks.

    Raises:
        ConfigError: If name or options are unknown, or there are several tasks and the ranker's constructor does not
            take their number.
    """
    name = options.ranker
    takes_tasks = "num_tasks" in inspect.signature(RANKERS.get(name).build).parameters
    if len(tasks) > 1 and not takes_tasks:
        raise ConfigError(
            f"--model.ranker {name} ranks by one task, but the data has {len(tasks)} ({', '.join(tasks)}); give its "
            "constructor a third argument `num_tasks` and return logits [B, num_tasks], or take another ranker"
        )
    more = [len(tasks)] if takes_tasks else []
    return build_part(RANKERS, name, options.ranker_options, block_dims, *more)


def task_weights(weights: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """Return the weight of each task's loss by name, 1 where none is given.

    Raises:
        ConfigError: If there is one task only, a name is not that of a task, or no task has any weight.
    """
    if len(tasks) == 1 and weights:
        raise ConfigError("--model.task_weights weighs tasks against each other, but the data has one; leave it out")
    for name in weights:
        if name not in tasks:
            raise ConfigError(
                f"--model.task_weights names '{name}', which is no task of the data; tasks: {', '.join(tasks)}."
                f"{closest(name, list(tasks))}"
            )
    found = {name: float(weights.get(name, 1.0)) for name in tasks}
    if not any(found.values()):
        raise ConfigError("--model.task_weights is 0 for every task, must be above 0 for one at least")
    return found
