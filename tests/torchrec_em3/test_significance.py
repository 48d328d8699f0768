"""The tests of differences: against SciPy, against the metrics they explain, and on data without a difference."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel

from tests.fake_runs import fake_run
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.run_record import RunRecord, read_records
from torchrec_em3.significance import bootstrap_mean, pair_runs, paired_tests
from torchrec_em3.variants import group_variants


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


def pairs_of(folders: list[Path]) -> list[tuple[RunRecord, RunRecord]]:
    first, second = group_variants(read_records(folders))
    return pair_runs(first, second)


def test_seeds_are_tested_as_pairs(data: PreparedData, tmp_path: Path) -> None:
    folders = [
        fake_run(tmp_path / f"{content}{seed}", data, content=content, seed=seed)
        for content in (False, True)
        for seed in (1, 2, 3)
    ]
    pairs = pairs_of(folders)
    tests = {test.metric: test for test in paired_tests(pairs)}
    assert list(tests) == ["AUC", "AUC, items never trained on", "GAUC", "log-loss"]
    want = ttest_rel([b.test["logloss"] for _, b in pairs], [a.test["logloss"] for a, _ in pairs])
    found = tests["log-loss"]
    assert found.p == pytest.approx(want.pvalue)
    assert found.interval == pytest.approx(tuple(want.confidence_interval(0.95)))
    assert (found.n, found.unit, found.method) == (3, "seeds", "paired t-test")
    assert found.difference < 0
    assert found.better
    assert tests["AUC"].better


def test_runs_of_one_seed_are_no_independent_ones(data: PreparedData, tmp_path: Path) -> None:
    again = [fake_run(tmp_path / name, data, content=name < "b", seed=1) for name in ("a1", "a2", "b1", "b2")]
    [(first, second)] = pairs_of([*reversed(again), again[0]])
    assert (first.name, second.name) == ("b1", "a1"), "the last of each"
    assert {test.unit for test in paired_tests([(first, second)])} == {"users"}


def test_one_seed_is_tested_over_users(data: PreparedData, tmp_path: Path) -> None:
    pairs = pairs_of([fake_run(tmp_path / name, data, content=name == "b") for name in ("a", "b")])
    [(a, b)] = pairs
    gauc, logloss = paired_tests(pairs)
    assert gauc.difference == pytest.approx(b.test["gauc"] - a.test["gauc"], abs=1e-5)
    assert logloss.difference == pytest.approx(b.test["logloss"] - a.test["logloss"], abs=1e-5)
    assert logloss.n == len(np.unique(a.test_rows.user))
    assert gauc.n < logloss.n
    assert {test.unit for test in (gauc, logloss)} == {"users"}
    assert all(test.interval[0] < test.difference < test.interval[1] for test in (gauc, logloss))


def test_a_run_against_itself_shows_nothing(data: PreparedData, tmp_path: Path) -> None:
    [record] = read_records([fake_run(tmp_path / "a", data, content=True)])
    for test in paired_tests([(record, record)]):
        assert test.difference == 0
        assert test.p == 1
        assert test.better is None


def test_nothing_is_tested_without_pairs_or_the_same_rows(data: PreparedData, tiny_data: Path, tmp_path: Path) -> None:
    other = PreparedData.open(tiny_data)
    [a, b] = read_records(
        [fake_run(tmp_path / "a", data, content=True), fake_run(tmp_path / "b", other, content=False)]
    )
    assert paired_tests([]) == []
    assert paired_tests([(a, b)]) == []


def test_the_bootstrap_is_that_of_scipy() -> None:
    random = np.random.default_rng(1)
    value = random.normal(0.1, 1.0, 80)
    mean, (low, high), p = bootstrap_mean(value, np.ones(80))
    want = bootstrap((value,), np.mean, n_resamples=5000, method="percentile", rng=2).confidence_interval
    assert mean == pytest.approx(value.mean())
    assert (low, high) == pytest.approx((want.low, want.high), abs=0.02)
    assert 0.05 < p <= 1
    assert bootstrap_mean(value + 5, np.ones(80))[2] == pytest.approx(2 / 2001)
    assert bootstrap_mean(value, np.ones(80)) == bootstrap_mean(value, np.ones(80))


def test_users_count_by_their_weight() -> None:
    mean, (low, high), _ = bootstrap_mean(np.array([1.0, 0.0]), np.array([3.0, 1.0]))
    assert mean == 0.75
    assert (low, high) == (0.0, 1.0)
