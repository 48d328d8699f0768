"""What content changed: runs with the same data compared with the baseline among them, slice by slice, in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.metrics import FREQUENCY_SLICES, USER_SLICES, auc_difference
from torchrec_em3.run_record import RunRecord
from torchrec_em3.significance import DifferenceTest, pair_runs, paired_tests, same_rows
from torchrec_em3.variants import Variant, closest_baseline, group_variants

__all__ = ["Comparison", "SliceComparison", "compare", "small_slice"]

SMALL_ROWS = 1000
NORMAL_95 = 1.959964
UNSEEN = "0"
SLICE_TITLES = {
    "0": "items never trained on",
    "1-5": "items trained on 1-5 times",
    "6-20": "items trained on 6-20 times",
    "21+": "items trained on 21 times or more",
    "known": "known users",
    "new": "new users",
}


@dataclass(frozen=True)
class SliceComparison:
    """One group of test rows under two models.

    Attributes:
        title: What the rows have in common.
        n: How many they are.
        first: Mean AUC of the baseline's runs; `second` that of the other model's. None where undefined.
        second: As `first`.
        interval: Ends of the 95% interval of the difference, or None where it is not known.
        attainable: Best attainable AUC, where the true probabilities are known.
    """

    title: str
    n: int
    first: float | None
    second: float | None
    interval: tuple[float, float] | None
    attainable: float | None

    @property
    def difference(self) -> float | None:
        """AUC of the second model minus that of the first."""
        return None if self.first is None or self.second is None else self.second - self.first

    @property
    def closed_share(self) -> float | None:
        """Share of the way from the first model to the best attainable AUC that the second has gone.

        None where the attainable AUC is not known, is no better than the first model's, or rests on few rows.
        """
        if self.difference is None or self.first is None or self.attainable is None:
            return None
        if small_slice(self.n) or self.attainable <= self.first:
            return None
        return self.difference / (self.attainable - self.first)

    @property
    def outcome(self) -> str:
        """What the difference amounts to, as the end of a sentence that begins with the name of the cause."""
        if self.difference is None:
            return "cannot be judged"
        if self.interval is None:
            return "seems to help" if self.difference > 0 else "does not seem to help"
        low, high = self.interval
        if low > 0:
            return "helped"
        return "hurt" if high < 0 else "made no clear difference"


@dataclass(frozen=True)
class Comparison:
    """Runs of one model against those of the baseline on the same data.

    Attributes:
        title: The verdict in one sentence.
        first: Name of the baseline model; `second` that of the other.
        second: As `first`.
        split: Name of the split.
        slices: All rows, then each slice that both models report.
        basis: How the intervals were obtained, one sentence.
        against_id_only: Whether the baseline is without content.
        tests: Of the difference, by metric; empty where there is nothing to test on.
    """

    title: str
    first: str
    second: str
    split: str
    slices: Sequence[SliceComparison]
    basis: str
    against_id_only: bool
    tests: Sequence[DifferenceTest]


def small_slice(n: int) -> bool:
    """Whether a slice has so few rows that its AUC is only a hint."""
    return n < SMALL_ROWS


def compare(records: Sequence[RunRecord], data: Mapping[str, PreparedData]) -> list[Comparison]:
    """Compare every variant with its baseline (see `closest_baseline`).

    Runs of one variant, which differ in the seed alone, are averaged. Runs on other data are never compared.

    Args:
        records: Runs, evaluated or not.
        data: Prepared folder by name of the run; may lack runs whose data cannot be read.
    """
    variants = group_variants([record for record in records if record.test])
    baselines = ((variant, closest_baseline(variant, variants)) for variant in variants)
    pairs = [(first, second) for second, first in baselines if first is not None]
    return [_compare_models(first, second, data, only_one=len(pairs) == 1) for first, second in pairs]


def _compare_models(first: Variant, second: Variant, data: Mapping[str, PreparedData], *, only_one: bool) -> Comparison:
    pairs = pair_runs(first, second)
    slices = [
        _compare_slice(key, first.runs, second.runs, pairs, data)
        for key in (None, *SLICE_TITLES)
        if any(_slice(record, key) for record in (*first.runs, *second.runs))
    ]
    cause = f"'{second.name}'"
    if second.uses_content and not first.uses_content:
        cause = "Content" if only_one else f"Content ({cause})"
    return Comparison(
        title=_title(cause, slices),
        first=first.name,
        second=second.name,
        split=first.place.split,
        slices=slices,
        basis=_basis(len(pairs), slices),
        against_id_only=not first.uses_content,
        tests=paired_tests(pairs),
    )


def _title(cause: str, slices: Sequence[SliceComparison]) -> str:
    whole = slices[0].outcome
    unseen = next((part for part in slices if part.title == SLICE_TITLES[UNSEEN] and part.difference is not None), None)
    if unseen is None:
        return f"{cause} {whole}."
    if unseen.outcome == whole:
        return f"{cause} {whole}, on the whole and on items never seen in training."
    return f"{cause} {whole} on the whole and {unseen.outcome} on items never seen in training."


def _basis(num_pairs: int, slices: Sequence[SliceComparison]) -> str:
    if all(part.interval is None for part in slices):
        return "No intervals: they need the predictions of both runs, or two seeds of each model."
    if num_pairs > 1:
        return (
            f"95% intervals from {num_pairs} pairs of runs with the same seed (Student's t): they cover the chance in "
            "training, not that in the choice of test rows."
        )
    return (
        "95% intervals from the test rows of one run each (DeLong), rows taken as independent: they say nothing about "
        "what another seed of the training would give."
    )


def _slice(record: RunRecord, key: str | None) -> Mapping[str, Any]:
    if key is None:
        return record.test
    slices = record.test.get("slices") or {}
    part: Mapping[str, Any] = (slices.get("item_frequency") or {}).get(key) or (slices.get("user") or {}).get(key) or {}
    return part


def _compare_slice(
    key: str | None,
    first: Sequence[RunRecord],
    second: Sequence[RunRecord],
    pairs: Sequence[tuple[RunRecord, RunRecord]],
    data: Mapping[str, PreparedData],
) -> SliceComparison:
    both = [_slice(record, key) for record in (*first, *second)]
    if pairs:
        # Of the very runs that the interval is of, so that it is one of the difference that is shown.
        shown = [pair for pair in pairs if all(_slice(run, key).get("auc") is not None for run in pair)]
        first, second = [a for a, _ in shown], [b for _, b in shown]
    return SliceComparison(
        title=SLICE_TITLES[key] if key else "all test rows",
        n=int(next((part["n"] for part in both if part.get("n") is not None), 0)),
        first=_mean_auc(first, key),
        second=_mean_auc(second, key),
        interval=_seed_interval(key, pairs) if len(pairs) > 1 else _row_interval(key, pairs, data),
        attainable=next((part["attainable_auc"] for part in both if part.get("attainable_auc") is not None), None),
    )


def _mean_auc(records: Sequence[RunRecord], key: str | None) -> float | None:
    values = [value for record in records if (value := _slice(record, key).get("auc")) is not None]
    return float(np.mean(values)) if values else None


def _seed_interval(key: str | None, pairs: Sequence[tuple[RunRecord, RunRecord]]) -> tuple[float, float] | None:
    aucs = [(_slice(a, key).get("auc"), _slice(b, key).get("auc")) for a, b in pairs]
    differences = np.array([b - a for a, b in aucs if a is not None and b is not None])
    if len(differences) < 2:
        return None
    half = student_t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() - half), float(differences.mean() + half)


def _row_interval(
    key: str | None, pairs: Sequence[tuple[RunRecord, RunRecord]], data: Mapping[str, PreparedData]
) -> tuple[float, float] | None:
    for a, b in pairs:
        rows = _shared_rows(key, a, b, data.get(b.name))
        result = auc_difference(*rows) if rows is not None else None
        if result is not None and np.isfinite(result.standard_error):
            half = NORMAL_95 * result.standard_error
            return result.difference - half, result.difference + half
    return None


def _shared_rows(
    key: str | None, a: RunRecord, b: RunRecord, data: PreparedData | None
) -> tuple[NDArray, NDArray, NDArray] | None:
    """Return label and both logits of the rows of a slice, if both runs have predicted the very same rows."""
    first, second = a.test_rows, b.test_rows
    if first is None or second is None or not same_rows(first, second):
        return None
    if key is None:
        return first.label, first.logit, second.logit
    if data is None or first.item.max(initial=0) >= data.item_rows or first.user.max(initial=0) >= data.user_rows:
        return None
    mask = _mask(key, data.item_train_count[first.item], data.user_train_count[first.user])
    return first.label[mask], first.logit[mask], second.logit[mask]


def _mask(key: str, item_count: NDArray, user_count: NDArray) -> NDArray[np.bool_]:
    if key in USER_SLICES:
        mask: NDArray[np.bool_] = (user_count > 0) == (key == USER_SLICES[0])
        return mask
    low, high = FREQUENCY_SLICES[key]
    return (item_count >= low) & (item_count <= high)
