"""Whether two variants differ by more than chance: over seeds where there are several, else over users.

Shape letters: n rows of a split, U users with rows, R resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from torchrec_em3.metrics import row_logloss, user_aucs
from torchrec_em3.run_record import RunRecord, TestRows
from torchrec_em3.variants import Variant

__all__ = ["RESAMPLES", "DifferenceTest", "bootstrap_mean", "pair_runs", "paired_tests", "same_rows"]

RESAMPLES = 2000
SEED = 0
Metrics = Mapping[str, Any]

METRICS: tuple[tuple[str, Callable[[Metrics], float | None]], ...] = (
    ("AUC", lambda test: test.get("auc")),
    ("AUC, items never trained on", lambda test: _unseen(test).get("auc")),
    ("GAUC", lambda test: test.get("gauc")),
    ("log-loss", lambda test: test.get("logloss")),
)
LOWER_IS_BETTER = frozenset({"log-loss"})

RunPair = tuple[RunRecord, RunRecord]


@dataclass(frozen=True)
class DifferenceTest:
    """One metric of two variants, compared pair by pair.

    Attributes:
        metric: Its name.
        method: The test, in a few words.
        n: Pairs that it rests on; `unit` is what a pair is.
        unit: "seeds" or "users".
        difference: Mean of second minus first.
        interval: Ends of its 95% interval.
        p: Two-sided p-value.
    """

    metric: str
    method: str
    n: int
    unit: str
    difference: float
    interval: tuple[float, float]
    p: float

    @property
    def better(self) -> bool | None:
        """Whether the second is better; None where the interval holds 0."""
        low, high = self.interval
        if low <= 0 <= high:
            return None
        return (high < 0) == (self.metric in LOWER_IS_BETTER)


def pair_runs(first: Variant, second: Variant) -> list[RunPair]:
    """Return the pairs of runs of the same seed; or the only two runs there are, whatever their seeds.

    Of several runs of one seed the last counts: they are no independent ones.
    """
    befores, afters = ({run.seed: run for run in variant.runs} for variant in (first, second))
    pairs = [(befores[seed], run) for seed, run in afters.items() if seed in befores]
    if not pairs and len(first.runs) == len(second.runs) == 1:
        pairs = [(first.runs[0], second.runs[0])]
    return pairs


def same_rows(first: TestRows | None, second: TestRows | None) -> bool:
    """Return whether two runs kept predictions of the very same rows."""
    if first is None or second is None:
        return False
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("user", "item", "label"))


def paired_tests(pairs: Sequence[RunPair]) -> list[DifferenceTest]:
    """Test each metric over the seeds or, for a single pair of runs, over the users of the test split.

    Returns:
        One entry a metric that can be tested; none if there are no pairs, or a lone pair without the same test rows.
    """
    if len(pairs) > 1:
        tests = [_over_seeds(name, read, pairs) for name, read in METRICS]
        return [test for test in tests if test is not None]
    if not pairs:
        return []
    first, second = (record.test_rows for record in pairs[0])
    if first is None or second is None or not same_rows(first, second):
        return []
    return _over_users(first, second)


def bootstrap_mean(value_U: NDArray, weight_U: NDArray, seed: int = SEED) -> tuple[float, tuple[float, float], float]:
    """Return the weighted mean over users, its 95% percentile interval, and the two-sided p-value of a mean of 0.

    Users are drawn with replacement, so rows of one user may depend on each other.

    Args:
        value_U: What each user contributes.
        weight_U: Weight of each user, positive.
        seed: Makes the result repeatable.
    """
    random, count = np.random.default_rng(seed), len(value_U)
    total_U = value_U * weight_U
    mean_R = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        drawn = random.integers(0, count, count)
        mean_R[resample] = total_U[drawn].sum() / weight_U[drawn].sum()
    low, high = np.quantile(mean_R, (0.025, 0.975))
    # One is added so that no finite number of resamples calls a difference impossible.
    tail = min((mean_R <= 0).sum(), (mean_R >= 0).sum())
    return float(total_U.sum() / weight_U.sum()), (float(low), float(high)), min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))


def _unseen(test: Metrics) -> Metrics:
    unseen: Metrics = ((test.get("slices") or {}).get("item_frequency") or {}).get("0") or {}
    return unseen


def _over_seeds(name: str, read: Callable[[Metrics], float | None], pairs: Sequence[RunPair]) -> DifferenceTest | None:
    values = [(read(a.test), read(b.test)) for a, b in pairs]
    differences = np.array([b - a for a, b in values if a is not None and b is not None])
    if len(differences) < 2 or not differences.std():
        return None
    result = ttest_1samp(differences, 0.0)
    low, high = result.confidence_interval(0.95)
    return DifferenceTest(
        metric=name,
        method="paired t-test",
        n=len(differences),
        unit="seeds",
        difference=float(differences.mean()),
        interval=(float(low), float(high)),
        p=float(result.pvalue),
    )


def _over_users(first: TestRows, second: TestRows) -> list[DifferenceTest]:
    columns = {
        "GAUC": _user_auc_differences(first, second),
        "log-loss": _user_logloss_differences(first, second),
    }
    tests = []
    for name, (value_U, weight_U) in columns.items():
        if len(value_U) > 1:
            difference, interval, p = bootstrap_mean(value_U, weight_U)
            tests.append(DifferenceTest(name, "bootstrap", len(value_U), "users", difference, interval, p))
    return tests


def _user_auc_differences(first: TestRows, second: TestRows) -> tuple[NDArray, NDArray]:
    """Return the difference of AUC of each user with both classes, and the user's rows."""
    (a_U, rows_U), (b_U, _) = (user_aucs(rows.label, rows.logit, rows.user) for rows in (first, second))
    return b_U - a_U, rows_U


def _user_logloss_differences(first: TestRows, second: TestRows) -> tuple[NDArray, NDArray]:
    difference = row_logloss(second.label, second.logit) - row_logloss(first.label, first.logit)
    _, place, rows_U = np.unique(first.user, return_inverse=True, return_counts=True)
    return np.bincount(place, difference) / rows_U, rows_U
