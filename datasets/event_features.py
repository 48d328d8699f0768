"""Features of events, numbers and categories: their columns, and what is learnt of them from the training events.

Shape letters: E events, V values.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from torchrec_em3.datasets.ids import Ids, count_codes, encode_ids, look_up, to_dictionary
from torchrec_em3.datasets.ordered_events import OrderedEvents
from torchrec_em3.datasets.splits import TRAIN
from torchrec_em3.errors import DataError

__all__ = ["dense_column", "index_sparse", "measure_dense", "sparse_column"]


def dense_column(feature: str) -> str:
    """Return what the column of a dense feature is called in files of events."""
    return f"dense_{feature}"


def sparse_column(feature: str) -> str:
    """Return what the column of a sparse feature is called in files of events."""
    return f"sparse_{feature}"


def measure_dense(events: OrderedEvents, features: Iterable[str]) -> list[dict[str, Any]]:
    """Return name, mean and standard deviation of each feature over the training events that know it.

    Raises:
        DataError: If none knows it.
    """
    training_E = events["split"] == TRAIN
    return [_measure(name, events[dense_column(name)][training_E]) for name in features]


def _measure(name: str, value_E: np.ndarray) -> dict[str, Any]:
    known_E = value_E[~np.isnan(value_E)].astype(np.float64)
    if not len(known_E):
        raise DataError(f"dense feature '{name}' is unknown in all {len(value_E)} training events; leave it out")
    return {"name": name, "mean": float(known_E.mean()), "std": float(known_E.std()) or 1.0}


def index_sparse(value_E: Ids, training_E: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Give every value of a sparse feature a row of a vocabulary.

    Args:
        value_E: The values; null and "" are unknown.
        training_E: Which events train, bool.

    Returns:
        The values by row, in string order behind "" in row 0, and the row of each event, int32 [E]. A value that no
        training event has would be an untrained row, so it is unknown.
    """
    values_V, code_E = encode_ids(to_dictionary(value_E).fill_null(""))
    known_V = (count_codes(code_E[training_E], len(values_V)) > 0) & (values_V != "")
    row_V = np.where(known_V, np.cumsum(known_V), 0).astype(np.int32)
    return ["", *values_V[known_V].tolist()], look_up(row_V, code_E)
