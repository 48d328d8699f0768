from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from tests.fake_runs import fake_run
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.metrics import auc_difference, ranking_metrics
from torchrec_em3.run_record import read_records
from torchrec_em3.verdict import SliceComparison, compare, small_slice


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


def compared(folders, data):
    records = read_records(folders)
    return records, compare(records, {record.name: data for record in records})


def test_one_pair_is_compared_on_its_test_rows(data, tmp_path):
    folders = [fake_run(tmp_path / "em3", data, content=True), fake_run(tmp_path / "id", data, content=False)]
    (em3, id_only), [comparison] = compared(folders, data)
    assert (comparison.first, comparison.second) == ("ID only", "fusion_qformer, history cache")
    whole = comparison.slices[0]
    assert whole.first == pytest.approx(id_only.test["auc"])
    assert whole.second == pytest.approx(em3.test["auc"])
    rows = em3.test_rows
    want = auc_difference(rows.label, id_only.test_rows.logit, rows.logit)
    assert whole.interval == pytest.approx(
        (want.difference - 1.96 * want.standard_error, want.difference + 1.96 * want.standard_error), abs=1e-4
    )
    unseen = next(part for part in comparison.slices if part.title == "items never trained on")
    mask = data.item_train_count[rows.item] == 0
    want = auc_difference(rows.label[mask], id_only.test_rows.logit[mask], rows.logit[mask])
    assert sum(unseen.interval) / 2 == pytest.approx(want.difference)
    assert unseen.n == mask.sum()
    assert unseen.difference == pytest.approx(want.difference)
    assert comparison.title == "Content helped, on the whole and on items never seen in training."
    new = next(part for part in comparison.slices if part.title == "new users")
    assert new.n == (data.user_train_count[rows.user] == 0).sum()


def test_seeds_are_averaged_and_give_the_interval(data, tmp_path):
    folders = [
        fake_run(tmp_path / f"{name}{seed}", data, content=content, seed=seed)
        for seed in (1, 2, 3)
        for name, content in (("em3", True), ("id", False))
    ]
    records, [comparison] = compared(folders, data)
    first, second = ([r.test["auc"] for r in records if r.uses_content == content] for content in (False, True))
    whole = comparison.slices[0]
    assert whole.first == pytest.approx(np.mean(first))
    assert whole.second == pytest.approx(np.mean(second))
    want = ttest_rel(second, first).confidence_interval(0.95)
    assert whole.interval == pytest.approx((want.low, want.high))
    assert "3 pairs" in comparison.basis


def test_the_difference_is_of_the_runs_that_its_interval_is_of(data, tmp_path):
    folders = [fake_run(tmp_path / f"id{seed}", data, content=False, seed=seed) for seed in (1, 2, 9)]
    folders += [fake_run(tmp_path / f"em3{seed}", data, content=True, seed=seed) for seed in (1, 2, 7)]
    records, [comparison] = compared(folders, data)
    whole = comparison.slices[0]
    assert whole.difference == pytest.approx(sum(whole.interval) / 2)
    assert whole.first == pytest.approx(np.mean([record.test["auc"] for record in records[:2]]))


def test_runs_on_other_data_or_splits_are_not_compared(data, tmp_path, tiny_data):
    other = PreparedData.open(tiny_data)
    folders = [fake_run(tmp_path / "a", data, content=False), fake_run(tmp_path / "b", other, content=True)]
    assert compared(folders, data)[1] == []
    assert compared(folders[:1], data)[1] == []


def test_without_an_id_only_run_the_first_model_is_the_baseline(data, tmp_path):
    folders = [fake_run(tmp_path / name, data, content=True) for name in ("a", "b")]
    for path, history in zip(folders, ("shared", "cache"), strict=True):
        summary = path / "summary.json"
        summary.write_text(summary.read_text().replace('"history": "cache"', f'"history": "{history}"'))
    _, [comparison] = compared(folders, data)
    assert comparison.first == "fusion_qformer, history shared"
    assert comparison.title.startswith("'fusion_qformer, history cache' made no clear difference")


def test_rows_that_differ_are_not_paired(data, tmp_path):
    folders = [fake_run(tmp_path / name, data, content=content) for name, content in (("a", False), ("b", True))]
    path = folders[0] / "predictions" / "test.npz"
    with np.load(path) as arrays:
        columns = dict(arrays)
    columns["item"] = columns["item"][::-1].copy()
    np.savez(path, **columns)
    _, [comparison] = compared(folders, data)
    assert {part.interval for part in comparison.slices} == {None}
    assert comparison.title.startswith("Content seems to help")
    assert comparison.basis.startswith("No intervals")


@pytest.mark.parametrize(
    ("interval", "second", "outcome"),
    [
        ((0.01, 0.03), 0.72, "helped"),
        ((-0.03, -0.01), 0.68, "hurt"),
        ((-0.01, 0.03), 0.71, "made no clear difference"),
        (None, 0.71, "seems to help"),
        (None, 0.69, "does not seem to help"),
        (None, None, "cannot be judged"),
    ],
)
def test_outcomes(interval, second, outcome):
    assert SliceComparison("x", 5000, 0.70, second, interval, None).outcome == outcome


def test_closed_share_needs_a_gap_and_enough_rows():
    assert SliceComparison("x", 5000, 0.6, 0.7, None, 0.8).closed_share == pytest.approx(0.5)
    assert SliceComparison("x", 999, 0.6, 0.7, None, 0.8).closed_share is None
    assert SliceComparison("x", 5000, 0.6, 0.7, None, 0.6).closed_share is None
    assert SliceComparison("x", 5000, 0.6, 0.7, None, None).closed_share is None
    assert small_slice(999)
    assert not small_slice(1000)


def test_the_fake_runs_carry_the_metrics_of_their_predictions(data, tmp_path):
    """What the other tests rest on."""
    [record] = read_records([fake_run(tmp_path / "a", data, content=True)])
    rows = record.test_rows
    want = ranking_metrics(rows.label, rows.logit, user=rows.user)
    assert record.test["gauc"] == pytest.approx(want["gauc"], abs=1e-5)
