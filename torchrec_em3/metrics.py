"""Ranking metrics in float64, over all rows and by slice. What is undefined is None (JSON null), never NaN.

Every function takes aligned one-dimensional arrays, one entry a row. Rows of weight 0 only fill up batches and are left
out.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchrec_em3.errors import DataError, NumericError

__all__ = [
    "FREQUENCY_SLICES",
    "USER_SLICES",
    "AucDifference",
    "CalibrationBin",
    "Metrics",
    "attainable_auc",
    "auc_difference",
    "calibration_bins",
    "ranking_metrics",
    "row_logloss",
    "sliced_metrics",
    "user_aucs",
]

Metrics = dict[str, float | int | None]
"""Metric by name."""

FREQUENCY_SLICES: dict[str, tuple[int, float]] = {"0": (0, 0), "1-5": (1, 5), "6-20": (6, 20), "21+": (21, np.inf)}
"""Least and largest count by slice name: training rows of the item, or events of the user before the row."""

USER_SLICES = ("known", "new")
"""Users with and without training rows."""

Floats = NDArray[np.float64]


class AucDifference(NamedTuple):
    """AUC of a second model minus that of a first, and the standard error of the difference over test rows."""

    difference: float
    standard_error: float


class CalibrationBin(NamedTuple):
    """Rows with neighbouring predictions: means, a 95% Wilson interval of the mean label, and the number of rows."""

    prediction: float
    label: float
    low: float
    high: float
    n: int


def ranking_metrics(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None, user: ArrayLike | None = None
) -> Metrics:
    """Measure how well logits rank and how far their probabilities can be trusted.

    Args:
        label: 1 or 0.
        logit: Log-odds of a 1, finite.
        weight: Weight of the row, >= 0; all 1 if left out.
        user: Group of the row for `gauc`, which is None without it.

    Returns:
        `auc`; `logloss` in nats; `ne`, normalised entropy: log-loss over that of always predicting the base rate, below
        1 is better than doing so; `calibration`, mean prediction over mean label, 1 is best; `gauc`, the mean over
        users of their own AUC, each weighted by the weight of the user's rows, users with one class left out; `n`,
        number of rows.

    Raises:
        DataError: If a label is neither 0 nor 1, a weight is negative or the lengths differ.
        NumericError: If a logit is not finite.
    """
    y, x, w, group = _aligned(label, logit, weight, user)
    result: Metrics = dict.fromkeys(("auc", "gauc", "ne", "logloss", "calibration"))
    result["n"] = len(y)
    if len(y) == 0:
        return result
    total = w.sum()
    base_rate = float(w @ y / total)
    logloss = float(w @ row_logloss(y, x) / total)
    result["logloss"] = logloss
    if y.any() and not y.all():
        entropy = -base_rate * np.log(base_rate) - (1.0 - base_rate) * np.log1p(-base_rate)
        result["auc"] = _auc(y, x, w)
        result["ne"] = float(logloss / entropy)
    if y.any():
        result["calibration"] = float(w @ _sigmoid(x) / total / base_rate)
    if group is not None:
        result["gauc"] = _grouped_auc(y, x, w, group)
    return result


def row_logloss(label: ArrayLike, logit: ArrayLike) -> Floats:
    """Return the log-loss of each row in nats."""
    x = np.asarray(logit, dtype=np.float64)
    return np.logaddexp(0.0, x) - np.asarray(label, dtype=np.float64) * x


def user_aucs(label: ArrayLike, logit: ArrayLike, user: ArrayLike) -> tuple[Floats, Floats]:
    """Return AUC and number of rows of each user with both classes, by rising user; `gauc` is their weighted mean.

    Raises:
        DataError: As `ranking_metrics`.
        NumericError: As `ranking_metrics`.
    """
    y, x, w, group = _aligned(label, logit, None, user)
    assert group is not None
    return _group_aucs(y, x, w, group) if len(y) else (y, w)


def sliced_metrics(
    label: ArrayLike,
    logit: ArrayLike,
    *,
    train_count: ArrayLike,
    known_user: ArrayLike,
    history_length: ArrayLike,
    weight: ArrayLike | None = None,
    user: ArrayLike | None = None,
    probability: ArrayLike | None = None,
) -> dict[str, dict[str, Metrics]]:
    """Return the metrics of rows by how often their item was trained on, by whether their user was, and by history.

    Args:
        label: 1 or 0.
        logit: Log-odds of a 1, finite.
        train_count: Training rows of the row's item, whole numbers >= 0.
        known_user: Whether the row's user has training rows.
        history_length: Events of the user before the row, whole numbers >= 0; a model may see fewer of them.
        weight: As in `ranking_metrics`.
        user: As in `ranking_metrics`.
        probability: True probability of a 1 where it is known; adds `attainable_auc` to each slice.

    Returns:
        {"item_frequency": {"0", "1-5", "6-20", "21+"}, "user": {"known", "new"}, "user_history": as item_frequency},
        each with the metrics of `ranking_metrics`.

    Raises:
        DataError: As `ranking_metrics`.
        NumericError: As `ranking_metrics`.
    """
    count, known, length = np.asarray(train_count), np.asarray(known_user, dtype=bool), np.asarray(history_length)
    columns = [None if c is None else np.asarray(c) for c in (label, logit, weight, user, probability)]
    _same_length(
        len(np.asarray(label)), train_count=count, known_user=known, history_length=length, probability=columns[-1]
    )

    def measure(mask: NDArray[np.bool_]) -> Metrics:
        y, x, w, group, truth = (None if c is None else c[mask] for c in columns)
        assert y is not None
        assert x is not None
        metrics = ranking_metrics(y, x, w, group)
        if truth is not None:
            metrics["attainable_auc"] = attainable_auc(truth, y, w)
        return metrics

    def measure_by_count(column: NDArray) -> dict[str, Metrics]:
        limits = FREQUENCY_SLICES.items()
        return {name: measure((column >= low) & (column <= high)) for name, (low, high) in limits}

    return {
        "item_frequency": measure_by_count(count),
        "user": dict(zip(USER_SLICES, (measure(known), measure(~known)), strict=True)),
        "user_history": measure_by_count(length),
    }


def attainable_auc(probability: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the AUC of ranking by the true probability of a 1: no model can do better on average. None with one class.

    Args:
        probability: True probability of a 1 in each row, known for simulated data only.
        label: The 1 or 0 that was drawn from it.
        weight: As in `ranking_metrics`.
    """
    y, p, w, _ = _aligned(label, probability, weight, None)
    return _auc(y, p, w) if len(np.unique(y)) == 2 else None


def auc_difference(label: ArrayLike, first: ArrayLike, second: ArrayLike) -> AucDifference | None:
    """Return AUC of `second` minus AUC of `first` on the same rows, with its standard error; None with one class.

    The error is DeLong's (1988), for rows drawn independently: it knows that both models were tested on the same rows,
    and nothing of what another random start of the training would give.

    Args:
        label: 1 or 0.
        first: Logits of the first model.
        second: Logits of the second model.

    Raises:
        DataError: As `ranking_metrics`.
        NumericError: As `ranking_metrics`.
    """
    y, a, _, _ = _aligned(label, first, None, None)
    _, b, _, _ = _aligned(label, second, None, None)
    positive = y == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        return None
    wins_a, wins_b = _placements(a, positive), _placements(b, positive)
    difference = wins_b - wins_a
    # One class of a single row leaves its part of the variance unknown; counting it as 0 would look like certainty.
    parts = [float(difference[c].var(ddof=1)) / k if k > 1 else np.inf for c, k in ((positive, m), (~positive, n))]
    return AucDifference(float(difference[positive].mean()), float(np.sqrt(sum(parts))))


def calibration_bins(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None, bins: int = 10
) -> list[CalibrationBin]:
    """Return mean prediction and mean label of up to `bins` groups of about equally many rows, for a reliability plot.

    Rows with the same logit are never split, so few distinct logits give fewer groups. No rows, no bins.

    Args:
        label: 1 or 0.
        logit: Log-odds of a 1, finite.
        weight: As in `ranking_metrics`; here it only tells which rows are left out.
        bins: Largest number of groups, >= 1.

    Raises:
        DataError: As `ranking_metrics`.
        NumericError: As `ranking_metrics`.
    """
    y, x, _, _ = _aligned(label, logit, weight, None)
    if len(y) == 0:
        return []
    edges = np.unique(np.quantile(x, np.linspace(0.0, 1.0, bins + 1)[1:-1], method="lower"))
    index = np.searchsorted(edges, x, side="left")
    n = np.bincount(index)
    used = n > 0
    prediction = np.bincount(index, _sigmoid(x))[used] / n[used]
    mean = np.bincount(index, y)[used] / n[used]
    low, high = _wilson(mean, n[used])
    columns = (c.tolist() for c in (prediction, mean, low, high, n[used]))
    return [CalibrationBin(*row) for row in zip(*columns, strict=True)]


def _wilson(rate: Floats, n: NDArray[np.int64]) -> tuple[Floats, Floats]:
    z2 = 1.959964**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _same_length(length: int, **columns: NDArray | None) -> None:
    for name, column in columns.items():
        if column is not None and column.shape != (length,):
            raise DataError(f"{name} has shape {column.shape}, must be ({length},) like label; pass one entry a row")


def _auc(y: Floats, x: Floats, w: Floats) -> float:
    # Takes a quarter of a training's time to start, and of several ranks the first alone computes metrics.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, x, sample_weight=w))


def _aligned(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None, user: ArrayLike | None
) -> tuple[Floats, Floats, Floats, NDArray | None]:
    """Return checked float64 columns without the rows of weight 0."""
    y, x = np.asarray(label, dtype=np.float64), np.asarray(logit, dtype=np.float64)
    w = np.ones_like(y) if weight is None else np.asarray(weight, dtype=np.float64)
    group = None if user is None else np.asarray(user)
    _same_length(y.size, label=y, logit=x, weight=w, user=group)
    if not (w >= 0).all():
        row = int(np.argmin(w >= 0))
        raise DataError(f"weight {w[row]} in row {row} must be at least 0")
    if not (w > 0).all():
        keep = w > 0
        y, x, w, group = y[keep], x[keep], w[keep], None if group is None else group[keep]
    binary = (y == 0) | (y == 1)
    if not binary.all():
        row = int(np.argmin(binary))
        raise DataError(f"label {y[row]} in row {row} must be 0 or 1; set a label threshold when preparing the data")
    finite = np.isfinite(x)
    if not finite.all():
        row = int(np.argmin(finite))
        raise NumericError(f"{int((~finite).sum())} of {len(x)} logits are not finite, first {x[row]} in row {row}")
    return y, x, w, group


def _grouped_auc(y: Floats, x: Floats, w: Floats, group: NDArray) -> float | None:
    """Mean of each group's AUC, weighted by the group's weight; ties count half."""
    auc, weight = _group_aucs(y, x, w, group)
    return float(np.average(auc, weights=weight)) if len(auc) else None


def _group_aucs(y: Floats, x: Floats, w: Floats, group: NDArray) -> tuple[Floats, Floats]:
    """Return AUC and weight of each group with both classes, in the order of the groups."""
    order = np.lexsort((x, group))
    y, x, w, group = y[order], x[order], w[order], group[order]
    new_group = np.concatenate(([True], group[1:] != group[:-1]))
    starts = np.flatnonzero(new_group | np.concatenate(([True], x[1:] != x[:-1])))
    positive, negative = np.add.reduceat(w * y, starts), np.add.reduceat(w * (1.0 - y), starts)
    first_tie = np.flatnonzero(new_group[starts])
    below = np.cumsum(negative) - negative
    below -= np.repeat(below[first_tie], np.diff(np.append(first_tie, len(starts))))
    wins = np.add.reduceat(positive * (below + 0.5 * negative), first_tie)
    num_positive, num_negative = np.add.reduceat(positive, first_tie), np.add.reduceat(negative, first_tie)
    mixed = (num_positive > 0) & (num_negative > 0)
    auc = wins[mixed] / (num_positive[mixed] * num_negative[mixed])
    return auc, (num_positive + num_negative)[mixed]


def _placements(x: Floats, positive: NDArray[np.bool_]) -> Floats:
    """For each row, the share of rows of the other class that it is on the right side of; ties count half."""
    share = np.empty_like(x)
    for rows, others, sign in ((positive, x[~positive], 1.0), (~positive, x[positive], -1.0)):
        ranked = np.sort(sign * others)
        below = np.searchsorted(ranked, sign * x[rows], side="left")
        upto = np.searchsorted(ranked, sign * x[rows], side="right")
        share[rows] = 0.5 * (below + upto) / len(ranked)
    return share
