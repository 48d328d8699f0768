"""Progressive validation: metrics of each shard before it is trained on, and over all shards so far.

Kept as sums, so that a stream without end needs no predictions of the past. Source: ours.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.metrics import Metrics

__all__ = ["add_shard", "cumulative_metrics"]

Totals = dict[str, float]
"""Sums over shards by name; empty before the first."""


def add_shard(totals: Mapping[str, float], metrics: Metrics, label: NDArray[np.generic]) -> Totals:
    """Return the sums with one more shard.

    Args:
        totals: Sums over the shards before.
        metrics: What `ranking_metrics` says of the shard.
        label: The labels of its rows, 1 or 0.
    """
    rows = float(len(label))
    added = {"rows": rows, "positives": float(label.sum())}
    for name in ("logloss", "auc", "gauc"):
        value = metrics[name]
        if value is not None:  # AUC of one class only is undefined, and its rows do not count
            added |= {name: value * rows, f"{name}_rows": rows}
    return {name: totals.get(name, 0.0) + added.get(name, 0.0) for name in totals.keys() | added.keys()}


def cumulative_metrics(totals: Mapping[str, float]) -> Metrics:
    """Return the metrics over all shards so far.

    Returns:
        `logloss` and `ne` over all rows; `auc` and `gauc`, the shards' own weighted by their rows; None where
        undefined.
    """
    result: Metrics = {
        name: totals[name] / totals[f"{name}_rows"] if name in totals else None for name in ("auc", "gauc", "logloss")
    }
    base_rate = totals["positives"] / totals["rows"]
    result["ne"] = None
    if 0.0 < base_rate < 1.0 and result["logloss"] is not None:
        entropy = -base_rate * np.log(base_rate) - (1.0 - base_rate) * np.log1p(-base_rate)
        result["ne"] = float(result["logloss"] / entropy)
    return result
