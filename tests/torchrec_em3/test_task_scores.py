"""Packages of several tasks: a logit and a score of each, in Python, in files, over HTTP and on the hub."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from tests.torchrec_em3.packages import export, train
from tests.torchrec_em3.test_serve import serving
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.export_parity import split_requests
from torchrec_em3.serving.scorer import Request, Scorer


@pytest.fixture(scope="module")
def run(tiny_tasks_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_tasks_data, tmp_path_factory.mktemp("tasks") / "run", "--model.ranker", "mmoe")


@pytest.fixture(scope="module")
def package(run: Path) -> Path:
    return export(run, run.parent / "package", "fp32")


def test_logits_are_those_of_each_task(package: Path, run: Path, tiny_tasks_data: Path) -> None:
    scorer = Scorer.load(package)
    assert scorer.config.tasks == ("click", "like")
    evaluated = np.load(run / "predictions" / "test.npz")
    parts = split_requests(PreparedData.open(tiny_tasks_data), "test", scorer.config.max_history)
    logit_BT = np.concatenate([logit for part in parts for logit in scorer.logits(part)])
    np.testing.assert_allclose(logit_BT[:, 0], evaluated["logit"], atol=1e-5)
    np.testing.assert_allclose(logit_BT[:, 1], evaluated["logit_like"], atol=1e-5)
    assert np.abs(logit_BT[:, 0] - logit_BT[:, 1]).max() > 1e-3
    assert scorer.logits([Request("1", [], [])])[0].shape == (0, 2)


def test_a_file_gets_a_column_of_each_task(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    rows = pa.table({"user": ["1", "1", "2"], "history": [["3"], ["3"], []], "item": ["1", "2", "1"]})
    pq.write_table(rows, source)
    assert em3(["score", str(package), str(source), str(target)]) == 0
    table = pq.read_table(target)
    assert table.column_names == ["user", "history", "item", "score", "score_like"]
    expected = Scorer.load(package).score([Request("1", ["3"], ["1", "2"]), Request("2", [], ["1"])])
    found_BT = np.stack([table[name].to_numpy() for name in ("score", "score_like")], 1)
    np.testing.assert_allclose(found_BT, np.concatenate(expected), atol=1e-6)
    pq.write_table(rows.append_column("score_like", pa.array([0.0] * 3)), source)
    assert em3(["score", str(package), str(source), str(tmp_path / "other.parquet")]) == 3
    assert "has a column 'score_like' already" in capsys.readouterr().err


def test_an_answer_names_the_other_tasks(package: Path) -> None:
    (expected_KT,) = Scorer.load(package).score([Request("1", ["3"], ["1", "2"])])
    with serving(package) as url:
        body = {"user": "1", "history": ["3"], "candidates": ["1", "2"]}
        answer = requests.post(f"{url}/score", json=body, timeout=60).json()
    np.testing.assert_allclose(answer["scores"], expected_KT[:, 0], rtol=1e-6)
    assert list(answer["other_scores"]) == ["like"]
    np.testing.assert_allclose(answer["other_scores"]["like"], expected_KT[:, 1], rtol=1e-6)


def test_the_card_has_a_row_of_each_task(run: Path, tmp_path: Path) -> None:
    assert em3(["export", str(run), "--format", "hub", "--out", str(tmp_path / "model")]) == 0
    like = json.loads((run / "summary.json").read_text())["test"]["tasks"]["like"]
    assert f"| test, task like | {like['n']:,} | {like['auc']:.4f} |" in (tmp_path / "model" / "README.md").read_text()
