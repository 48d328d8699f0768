"""Features of events: what their columns are called, and what standardises the numbers.

Shape letters: E events.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from torchrec_em3.datasets.ordered_events import OrderedEvents
from torchrec_em3.datasets.splits import TRAIN
from torchrec_em3.errors import DataError

__all__ = ["dense_column", "measure_dense", "sparse_column"]


def dense_column(feature: str) -> str:
    """Return what the column of a dense feature is called in files of events."""
    return f"dense_{feature}"


def sparse_column(feature: str) -> str:
    """Return what the column of a sparse feature is called in files of events."""
    return f"sparse_{feature}"


def measure_dense(events: OrderedEvents, features: Collection[str]) -> list[dict[str, Any]]:
    """Return name, mean and standard deviation of each feature over the training events that know it.

    Raises:
        DataError: If none knows it.
    """
    if not features:
        return []
    training_E = events["split"] == TRAIN
    return [_measure(name, events[dense_column(name)][training_E]) for name in features]


def _measure(name: str, value_E: np.ndarray) -> dict[str, Any]:
    known_E = value_E[~np.isnan(value_E)].astype(np.float64)
    if not len(known_E):
        raise DataError(f"dense feature '{name}' is unknown in all {len(value_E)} training events; leave it out")
    return {"name": name, "mean": float(known_E.mean()), "std": float(known_E.std()) or 1.0}
