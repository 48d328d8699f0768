import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from torchrec_em3.errors import DataError, NumericError
from torchrec_em3.metrics import (
    attainable_auc,
    auc_difference,
    calibration_bins,
    ranking_metrics,
    sliced_metrics,
)

EXAMPLES = settings(max_examples=30, deadline=None)


@st.composite
def tables(draw, max_rows=40):
    """Few users and few distinct logits, so that ties, one-class users and single rows all occur."""
    n = draw(st.integers(1, max_rows))
    column = lambda values: np.array(draw(st.lists(values, min_size=n, max_size=n)))  # noqa: E731
    return (
        column(st.sampled_from([0.0, 1.0])),
        column(st.sampled_from([-2.0, -0.5, -0.5, 0.0, 0.25, 3.0])),
        column(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        column(st.integers(0, 4)),
    )


def auc_by_pairs(label, logit, weight):
    """Share of (positive, negative) pairs in the right order, ties half: the definition."""
    rows = list(zip(label, logit, weight, strict=True))
    wins = total = 0.0
    for (yi, xi, wi), (yj, xj, wj) in itertools.product(rows, rows):
        if yi == 1 and yj == 0:
            total += wi * wj
            wins += wi * wj * (0.5 if xi == xj else float(xi > xj))
    return wins / total if total else None


def gauc_by_loop(label, logit, weight, user):
    numerator = denominator = 0.0
    for u in set(user.tolist()):
        rows = user == u
        auc = auc_by_pairs(label[rows], logit[rows], weight[rows])
        if auc is not None:
            numerator += weight[rows].sum() * auc
            denominator += weight[rows].sum()
    return numerator / denominator if denominator else None


@EXAMPLES
@given(tables())
def test_auc_and_gauc_are_the_definition(table):
    label, logit, weight, user = table
    for w in (weight, np.ones_like(label)):
        got = ranking_metrics(label, logit, w, user)
        for name, want in (("auc", auc_by_pairs(label, logit, w)), ("gauc", gauc_by_loop(label, logit, w, user))):
            assert got[name] == (None if want is None else pytest.approx(want, abs=1e-12)), name
        assert got["n"] == (w > 0).sum()


@EXAMPLES
@given(tables())
def test_unweighted_gauc_is_sklearn_per_user(table):
    label, logit, _, user = table
    mixed = [user == u for u in np.unique(user) if len(set(label[user == u])) == 2]
    got = ranking_metrics(label, logit, user=user)["gauc"]
    if not mixed:
        assert got is None
    else:
        want = np.average([roc_auc_score(label[r], logit[r]) for r in mixed], weights=[r.sum() for r in mixed])
        assert got == pytest.approx(want, abs=1e-12)


@EXAMPLES
@given(tables())
def test_logloss_ne_and_calibration(table):
    label, logit, weight, _ = table
    got = ranking_metrics(label, logit, weight)
    keep = weight > 0
    if not keep.any():
        assert all(value is None for name, value in got.items() if name != "n")
        return
    probability = 1 / (1 + np.exp(-logit))
    base = np.average(label, weights=weight)
    want = log_loss(label[keep], probability[keep], sample_weight=weight[keep], labels=[0, 1])
    assert got["logloss"] == pytest.approx(want)
    if 0 < base < 1:
        entropy = log_loss(label[keep], np.full(keep.sum(), base), sample_weight=weight[keep], labels=[0, 1])
        assert got["ne"] == pytest.approx(want / entropy)
    else:
        assert got["ne"] is None
    if base > 0:
        assert got["calibration"] == pytest.approx(np.average(probability, weights=weight) / base)
    else:
        assert got["calibration"] is None


@EXAMPLES
@given(tables(), st.randoms())
def test_order_of_rows_and_monotone_logits_do_not_matter(table, random):
    label, logit, weight, user = table
    order = list(range(len(label)))
    random.shuffle(order)
    first = ranking_metrics(label, logit, weight, user)
    second = ranking_metrics(label[order], (3.0 * logit + 1.0)[order], weight[order], user[order])
    for name in ("auc", "gauc"):
        assert first[name] == (None if second[name] is None else pytest.approx(second[name], abs=1e-12))


def test_results_are_json_without_nan():
    for label in ([], [1.0], [0.0], [1.0, 1.0], [0.0, 1.0]):
        metrics = ranking_metrics(label, np.zeros(len(label)), user=np.zeros(len(label), dtype=int))
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert ranking_metrics([0.0, 1.0], [0.0, 0.0], user=[7, 7]) == {
        "auc": 0.5,
        "gauc": 0.5,
        "ne": pytest.approx(1.0),
        "logloss": pytest.approx(np.log(2)),
        "calibration": pytest.approx(1.0),
        "n": 2,
    }


def test_one_class_is_seen_through_the_rounding_of_weights():
    rng = np.random.default_rng(0)
    for n in range(1, 60):
        got = ranking_metrics(np.ones(n), rng.normal(size=n), weight=rng.random(n) + 0.1)
        assert got["auc"] is None
        assert got["ne"] is None


def test_extreme_logits_stay_finite():
    got = ranking_metrics([1.0, 0.0], [-800.0, 900.0])
    assert got["logloss"] == pytest.approx(850.0)
    assert got["auc"] == 0.0


def test_float32_input_is_summed_in_float64():
    n = 1_000_000
    label = np.tile(np.array([0.0, 1.0], dtype=np.float32), n // 2)
    logit = np.where(label == 1, np.float32(0.1), np.float32(-0.1))
    want = np.log1p(np.exp(-np.float64(np.float32(0.1))))
    assert ranking_metrics(label, logit)["logloss"] == pytest.approx(want, rel=1e-12)


def test_a_million_rows_take_less_than_two_seconds():
    rng = np.random.default_rng(0)
    n = 1_000_000
    label, logit, user = rng.random(n) < 0.3, rng.normal(size=n).astype(np.float32), rng.integers(0, 50_000, n)
    start = time.process_time()
    ranking_metrics(label, logit, user=user)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.5], [0.0]), DataError, "label 0.5 in row 0"),
        (([1.0, 0.0], [0.0]), DataError, "logit has shape"),
        (([1.0, 0.0], [0.0, np.nan]), NumericError, "1 of 2 logits"),
        (([1.0, 0.0], [0.0, 1.0], [1.0, -1.0]), DataError, "weight -1.0 in row 1"),
        (([1.0, 0.0], [0.0, 1.0], [1.0, np.nan]), DataError, "weight nan in row 1"),
    ],
)
def test_bad_rows_are_named(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        ranking_metrics(*arguments)
    assert "\n" not in str(caught.value)


def test_a_filling_row_may_hold_anything():
    got = ranking_metrics([1.0, 0.0, 0.0], [1.0, 0.0, np.nan], weight=[1.0, 1.0, 0.0])
    assert got["auc"] == 1.0
    assert got["n"] == 2


@EXAMPLES
@given(tables(), st.data())
def test_slices_partition_the_rows_by_their_limits(table, data):
    label, logit, weight, user = table
    count = np.array([data.draw(st.sampled_from([0, 1, 5, 6, 20, 21, 400])) for _ in label])
    length = np.array([data.draw(st.sampled_from([0, 1, 5, 6, 20, 21, 400])) for _ in label])
    known = np.array([data.draw(st.booleans()) for _ in label])
    slices = sliced_metrics(
        label,
        logit,
        train_count=count,
        known_user=known,
        history_length=length,
        weight=weight,
        user=user,
        probability=np.full(len(label), 0.3),
    )
    assert list(slices["item_frequency"]) == ["0", "1-5", "6-20", "21+"]
    assert list(slices["user"]) == ["known", "new"]
    assert list(slices["user_history"]) == ["0", "1-5", "6-20", "21+"]
    for kind, masks in (
        *(
            (kind, (n == 0, np.isin(n, [1, 5]), np.isin(n, [6, 20]), np.isin(n, [21, 400])))
            for kind, n in (("item_frequency", count), ("user_history", length))
        ),
        ("user", (known, ~known)),
    ):
        for got, mask in zip(slices[kind].values(), masks, strict=True):
            truth = got.pop("attainable_auc")
            assert got == ranking_metrics(label[mask], logit[mask], weight[mask], user[mask])
            assert truth == (None if got["auc"] is None else 0.5)


def test_slices_refuse_columns_of_another_length():
    with pytest.raises(DataError, match="train_count"):
        sliced_metrics([1.0, 0.0], [0.0, 1.0], train_count=[1], known_user=[True, True], history_length=[0, 0])
    with pytest.raises(DataError, match="history_length"):
        sliced_metrics([1.0, 0.0], [0.0, 1.0], train_count=[1, 1], known_user=[True, True], history_length=[0])


def test_no_model_beats_the_attainable_auc_on_average():
    rng = np.random.default_rng(1)
    probability = rng.beta(1.0, 2.0, size=50_000)
    label = rng.random(50_000) < probability
    best = attainable_auc(probability, label)
    noisy = attainable_auc(np.clip(probability + 0.2 * rng.normal(size=50_000), 0, 1), label)
    assert best == pytest.approx(roc_auc_score(label, probability))
    assert noisy < best - 0.02
    assert attainable_auc([0.2, 0.4], [1.0, 1.0]) is None


def test_auc_difference_and_its_error_against_resampling():
    rng = np.random.default_rng(2)
    n = 400
    taste = rng.normal(size=n)
    label = (rng.random(n) < 1 / (1 + np.exp(-taste))).astype(float)
    first, second = taste + rng.normal(size=n), np.round(taste + 0.3 * rng.normal(size=n), 1)
    got = auc_difference(label, first, second)
    assert got.difference == pytest.approx(roc_auc_score(label, second) - roc_auc_score(label, first), abs=1e-12)
    resampled = []
    for _ in range(300):
        rows = rng.integers(0, n, n)
        resampled.append(roc_auc_score(label[rows], second[rows]) - roc_auc_score(label[rows], first[rows]))
    assert got.standard_error == pytest.approx(np.std(resampled), rel=0.2)
    assert auc_difference(label, first, first) == (0.0, 0.0)
    assert auc_difference([1.0, 1.0], [0.0, 1.0], [1.0, 0.0]) is None
    assert auc_difference([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]).standard_error == np.inf


@EXAMPLES
@given(tables(max_rows=60), st.integers(1, 12))
def test_calibration_bins_cover_every_row_once(table, bins):
    label, logit, weight, _ = table
    got = calibration_bins(label, logit, weight, bins=bins)
    keep = weight > 0
    assert sum(b.n for b in got) == keep.sum()
    assert len(got) <= bins
    if not got:
        return
    assert sum(b.n * b.label for b in got) == pytest.approx(label[keep].sum())
    assert sum(b.n * b.prediction for b in got) == pytest.approx((1 / (1 + np.exp(-logit[keep]))).sum())
    assert all(0 <= b.low <= b.label + 1e-12 and b.label - 1e-12 <= b.high <= 1 for b in got)
    assert all(a.prediction < b.prediction for a, b in itertools.pairwise(got))


def test_calibration_bins_hold_equally_many_rows():
    logit = np.random.default_rng(3).normal(size=1000)
    assert [b.n for b in calibration_bins(logit > 0, logit, bins=10)] == [100] * 10
