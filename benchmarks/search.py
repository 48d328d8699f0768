"""A small search on validation, the same number of trials and the same points for every row."""

from collections.abc import Callable
from typing import Any

import optuna

__all__ = ["search"]

SEED = 1
"""With two options of two values the second trial then changes both."""


def search(
    space: dict[str, list[Any]], trials: int, objective: Callable[[int, dict[str, Any]], float]
) -> list[dict[str, Any]]:
    """Try points of a grid; return `options` and their figure on `validation`, a dict a trial.

    The first trial takes each option's first value, which is to be the default. The sampler is seeded and random, so
    that every row tries the same points and an interrupted search goes on where it was.

    Args:
        space: Values by option.
        trials: How many points to try, >= 1.
        objective: From the trial's number and its options to the figure to be maximised.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=SEED))
    study.enqueue_trial({name: values[0] for name, values in space.items()})

    def run(trial: optuna.Trial) -> float:
        options = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
        return objective(trial.number, options)

    study.optimize(run, n_trials=trials)
    return [{"options": trial.params, "validation": trial.value} for trial in study.trials]
