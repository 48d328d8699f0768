"""The labels of events, one a task: from thresholds on the rating, or as the data set gives them."""

from collections.abc import Mapping, Sequence

import numpy as np

from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["DEFAULT_TASK", "make_labels", "task_columns", "task_thresholds"]

DEFAULT_TASK = "label"
"""Name of the one task of data whose tasks have no names."""


def task_columns(column: str, tasks: Sequence[str]) -> list[str]:
    """Return what a column is called for each task: the plain name for the main task, the first one.

    So whatever reads `label` of data with several tasks reads the label of the main one.
    """
    return [column, *(f"{column}_{task}" for task in tasks[1:])]


def task_thresholds(raw: RawDataset, threshold: float | None, labels: Mapping[str, float]) -> dict[str, float | None]:
    """Return by name of each task, the main one first, the smallest rating that is positive; None if 0 and 1 are given.

    Args:
        raw: The data set; labels of its own stand in place of any threshold.
        threshold: Threshold of the only task.
        labels: Threshold by name of several tasks, in place of `threshold`.

    Raises:
        ConfigError: If both the data set and `labels` name the tasks.
    """
    if raw.labels and labels:
        raise ConfigError(
            f"data set '{raw.name}' has labels of its own ({', '.join(raw.labels)}), so --labels "
            f"{', '.join(labels)} would make others of its ratings; leave it out"
        )
    return dict.fromkeys(raw.labels) or dict(labels) or {DEFAULT_TASK: threshold}


def make_labels(raw: RawDataset, thresholds: Mapping[str, float | None]) -> dict[str, np.ndarray]:
    """Return the labels of the events, int8, by name of their column.

    Args:
        raw: A data set that `check_raw` has passed.
        thresholds: What `task_thresholds` returned.

    Raises:
        DataError: If a rating is neither 0 nor 1 though it has no threshold.
    """
    columns = task_columns("label", list(thresholds))
    return {column: _label(raw, *task) for column, task in zip(columns, thresholds.items(), strict=True)}


def _label(raw: RawDataset, task: str, threshold: float | None) -> np.ndarray:
    if threshold is not None:
        return (raw.rating >= threshold).astype(np.int8)
    if task in raw.labels:
        return raw.labels[task].astype(np.int8)
    bad = (raw.rating != 0) & (raw.rating != 1)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"data set '{raw.name}' row {row}: rating is {raw.rating[row]:g}, but without a label threshold it must be "
            "0 or 1; set --label_threshold"
        )
    return raw.rating.astype(np.int8)
