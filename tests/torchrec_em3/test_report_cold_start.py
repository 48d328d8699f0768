"""The cold-start curve: its numbers against plain computation, and its intervals."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.fake_runs import fake_run
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.report_cold_start import RESAMPLES, cold_start_curves, resampled_aucs
from torchrec_em3.run_record import read_records
from torchrec_em3.variants import group_variants


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


def test_a_bin_has_the_auc_of_its_rows_averaged_over_seeds(data: PreparedData, tmp_path: Path) -> None:
    folders = [
        fake_run(tmp_path / f"{content}{seed}", data, content=content, seed=seed)
        for content in (False, True)
        for seed in (1, 2)
    ]
    records = read_records(folders)
    [curve] = cold_start_curves(group_variants(records), dict.fromkeys([r.name for r in records], data))
    assert curve["legend"] == [("ID only", 2), ("fusion_qformer, history cache", 2)]
    rows = {row["name"]: row for row in curve["rows"]}
    count = data.item_train_count[records[0].test_rows.item]
    for name, mask in (("0", count == 0), ("11-31", (count >= 11) & (count <= 31))):
        assert rows[name]["n"] == mask.sum()
        assert rows[name]["items"] == len(np.unique(records[0].test_rows.item[mask]))
        for cell, runs in zip(rows[name]["cells"], (records[:2], records[2:]), strict=True):
            want = [roc_auc_score(r.test_rows.label[mask], r.test_rows.logit[mask]) for r in runs]
            assert cell["auc"] == pytest.approx(np.mean(want))
            assert cell["low"] < cell["auc"] < cell["high"]
    assert sum(row["n"] for row in curve["rows"]) == len(count)
    assert "<polygon" in curve["chart"]


def test_no_curve_without_predictions_or_data(data: PreparedData, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "a", data, content=True)
    assert cold_start_curves(group_variants(read_records([folder])), {}) == []
    (folder / "predictions" / "test.npz").unlink()
    assert cold_start_curves(group_variants(read_records([folder])), {"a": data}) == []


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 40), levels=st.integers(1, 10))
def test_a_draw_is_the_auc_of_the_rows_it_repeats(seed: int, count: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    label, cluster = random.integers(0, 2, count), random.integers(0, 5, count)
    logit = random.integers(0, levels, count).astype(np.float32)
    found = resampled_aucs(label, logit, cluster, seed)
    assert found.shape == (RESAMPLES,)
    names, draws = np.unique(cluster), np.random.default_rng(seed)
    for auc in found[:5]:
        drawn = names[draws.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(cluster == name) for name in drawn])
        if len(np.unique(label[rows])) == 2:
            assert auc == pytest.approx(roc_auc_score(label[rows], logit[rows]))
        else:
            assert np.isnan(auc)
