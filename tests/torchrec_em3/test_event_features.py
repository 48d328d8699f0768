"""Features of events end to end: they are ranked by, and every export takes them as it takes users and items."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.torchrec_em3.packages import export, train
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import DataError
from torchrec_em3.export_parity import split_requests
from torchrec_em3.hub import from_pretrained
from torchrec_em3.serving import batch
from torchrec_em3.serving.package import write_manifest
from torchrec_em3.serving.scorer import Request, Scorer
from torchrec_em3.serving.service import create_app


@pytest.fixture(scope="module")
def run(tiny_features_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_features_data, tmp_path_factory.mktemp("features") / "run", "--train.learning_rate", "0.01")


@pytest.fixture(scope="module")
def package(run: Path) -> Path:
    return export(run, run.parent / "package", "fp32")


def test_the_model_ranks_by_them(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test"]["auc"] > summary["attainable_auc"] + 0.05, "attainable without the hint"


@pytest.mark.parametrize("ranker", ["dcn_v2", "dlrm", "deepfm"])
def test_every_ranker_exports_with_parity(ranker: str, tiny_features_data: Path, tmp_path: Path) -> None:
    run = train(tiny_features_data, tmp_path / "run", "--model.ranker", ranker)
    scorer = Scorer.load(export(run, tmp_path / "package", "fp32"))
    assert scorer.config.parity["rows"] > 100
    if ranker == "dcn_v2":  # it multiplies features, which is beyond float32 here
        with pytest.raises(DataError, match=r"request 1: dense feature 'noise' is 1e\+30, must be .* near enough"):
            scorer.score([Request("1", [], ["3"], dense={"noise": noise, "hint": 9.0}) for noise in (0.5, 1e30)])


def test_the_package_scores_the_test_split_as_it_was_evaluated(
    run: Path, package: Path, tiny_features_data: Path
) -> None:
    scorer = Scorer.load(package)
    parts = split_requests(PreparedData.open(tiny_features_data), "test", scorer.config.max_history)
    logit = np.concatenate([logit for part in parts for logit in scorer.logits(part)])
    np.testing.assert_allclose(logit, np.load(run / "predictions" / "test.npz")["logit"], atol=1e-5)


def test_what_is_left_out_is_unknown_and_what_is_strange_is_refused(package: Path) -> None:
    scorer = Scorer.load(package)
    means = {feature.name: feature.mean for feature in scorer.config.dense}
    asked = [Request("1", ["2"], ["3", "4"], dense=dense) for dense in ({}, means, {"hint": float("nan")})]
    # One by one: rows of one pass may be rounded differently.
    nothing, mean, unknown = (scorer.logits([request])[0] for request in asked)
    assert nothing.tolist() == mean.tolist() == unknown.tolist()
    asked = [Request("1", ["2"], ["3", "4"], {"mood": mood}) for mood in ("never seen", "good", "bad")]
    strange, good, bad = (scorer.logits([request])[0] for request in asked)
    assert strange.tolist() == nothing.tolist()
    assert (bad < nothing).all()
    assert (nothing < good).all()
    (high,) = scorer.logits([Request("1", ["2"], ["3", "4"], dense={"hint": 100.0})])
    assert (high > nothing).all()
    with pytest.raises(DataError, match=r"no feature 'mod'; features: .*, mood, device"):
        scorer.score([Request("1", [], ["3"], {"mod": "good"})])
    for dense, message in (
        ({"hnt": 1.0}, "no dense feature 'hnt'; dense features: hint, noise"),
        ({"hint": float("inf")}, "dense feature 'hint' is inf, must be finite"),
        ({"hint": 1e300, "noise": 1.0}, r"request 1: dense feature 'hint' is 1e\+300, must be finite"),
        ({"hint": 1.0, "noise": -1e38}, r"request 1: dense feature 'noise' is -1e\+38, .* near enough to its mean 0\."),
    ):
        with pytest.raises(DataError, match=message):
            scorer.score([Request("1", [], ["3"]), Request("1", [], ["3"], dense=dense)])


def test_a_file_has_a_column_for_each(package: Path, tiny_features_data: Path, tmp_path: Path) -> None:
    requests = [
        request for part in split_requests(PreparedData.open(tiny_features_data), "test", 10) for request in part
    ]
    columns = {
        "user": [request.user for request in requests],
        "history": [list(request.history) for request in requests],
        "item": [request.candidates[0] for request in requests],
        "hint": [None if np.isnan(request.dense["hint"]) else request.dense["hint"] for request in requests],
        "noise": [request.dense["noise"] for request in requests],
        "mood": [request.features["mood"] or None for request in requests],
        "device": [request.features["device"] for request in requests],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    assert em3(["score", str(package), str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")]) == 0
    expected = np.concatenate(Scorer.load(package).score(requests))
    np.testing.assert_allclose(pq.read_table(tmp_path / "out.parquet")["score"].to_numpy(), expected, atol=1e-6)
    pq.write_table(pa.table(columns | {"noise": ["a"] * len(requests)}), tmp_path / "in.parquet")
    assert em3(["score", str(package), str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")]) == 3


@pytest.mark.parametrize(("number", "shown"), [(float("inf"), "inf"), (-1e300, r"-1e\+300")])
def test_a_number_that_is_too_large_is_one_line_that_names_its_row(
    number: float, shown: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ROWS_AT_A_TIME", 4)
    monkeypatch.setattr(batch, "ROWS_A_REQUEST", 2)
    columns = {"user": ["1"] * 10, "history": [["2"]] * 10, "item": ["3"] * 10, "hint": [0.5] * 8 + [number] * 2}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=rf"in\.parquet row 8: dense feature 'hint' is {shown}, must be finite"):
        batch.score_file(Scorer.load(package), tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.fixture(scope="module")
def truth_package(package: Path) -> Path:
    """The package, as if its moods were truth values; `em3 prepare` writes them so."""
    folder = package.with_name("truth_package")
    shutil.copytree(package, folder)
    moods = pq.read_table(folder / "vocab" / "mood.parquet")["value"].to_pylist()
    written = {"good": "true", "bad": "false"}
    values = pa.table({"value": [written.get(mood, mood) for mood in moods]})
    pq.write_table(values, folder / "vocab" / "mood.parquet")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return folder


def test_truth_values_are_those_of_the_vocabulary(truth_package: Path) -> None:
    scorer = Scorer.load(truth_package)
    moods = (True, np.True_, "true", False, np.False_, "false", "never seen")
    yes, of_numpy, as_text, no, *others, unknown = (
        scorer.logits([Request("1", ["2"], ["3"], {"mood": mood})])[0].item() for mood in moods
    )
    assert (yes, no) == (of_numpy, others[0]) == (as_text, others[1])
    assert no < unknown < yes
    with TestClient(create_app(truth_package)) as client:
        body = {"user": "1", "history": ["2"], "candidates": ["3"]}
        for mood in (True, False):
            (score,) = scorer.score([Request("1", ["2"], ["3"], {"mood": mood})])
            answer = client.post("/score", json=body | {"features": {"mood": mood}})
            np.testing.assert_allclose(answer.json()["scores"], score, atol=1e-6)
        for wrong in ({"user": True}, {"candidates": [True]}):
            assert client.post("/score", json=body | wrong).status_code == 422


def test_a_file_may_have_the_types_that_prepare_takes(truth_package: Path, tmp_path: Path) -> None:
    moods, users = [True, None, False, False], ["1", "2", "2", "1"]
    table = pa.table(
        {
            "user": pa.array(users).dictionary_encode(),
            "history": pa.array([[]] * 4, pa.list_(pa.null())),
            "item": pa.array([3, 4, 3, 4]).dictionary_encode(),
            "mood": moods,
            "device": pa.nulls(4),
            "hint": pa.nulls(4),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    scorer = Scorer.load(truth_package)
    assert batch.score_file(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet") == 4
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.drop_columns(["score"]).equals(pq.read_table(tmp_path / "in.parquet"))
    features = [{} if mood is None else {"mood": str(mood).lower()} for mood in moods]
    rows = zip(users, ["3", "4", "3", "4"], features, strict=True)
    expected = np.concatenate(scorer.score([Request(user, [], [item], values) for user, item, values in rows]))
    np.testing.assert_allclose(out["score"].to_numpy(), expected, atol=1e-6)
    truths = table.set_column(0, "user", pa.array([True] * 4))
    pq.write_table(truths, tmp_path / "in.parquet")
    with pytest.raises(DataError, match="column 'user' is bool, expected strings or integers"):
        batch.score_file(scorer, tmp_path / "in.parquet", tmp_path / "other.parquet")


def test_the_service_takes_them(package: Path) -> None:
    body = {
        "user": "1",
        "history": ["2"],
        "candidates": ["3", "4"],
        "features": {"mood": "bad"},
        "dense": {"hint": 100},
    }
    with TestClient(create_app(package)) as client:
        scores = client.post("/score", json=body).json()["scores"]
        (expected,) = Scorer.load(package).score([Request("1", ["2"], ["3", "4"], {"mood": "bad"}, {"hint": 100.0})])
        np.testing.assert_allclose(scores, expected, atol=1e-6)
        for dense in ({"hint": "100"}, {"hnt": 1.0}, {"hint": None}, {"hint": 1e300}):
            assert client.post("/score", json=body | {"dense": dense}).status_code == 422
        infinite = '{"user": "1", "history": [], "candidates": ["3"], "dense": {"hint": 1e999}}'
        assert client.post("/score", content=infinite).status_code == 422


def test_the_hub_form_is_compared_and_knows_their_means(run: Path, tmp_path: Path) -> None:
    assert em3(["export", str(run), "--format", "hub", "--out", str(tmp_path / "hub")]) == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert [feature["name"] for feature in config["schema"]["dense"]] == ["hint", "noise"]
    assert [feature["name"] for feature in config["schema"]["sparse"]] == ["mood", "device"]
    from_pretrained(tmp_path / "hub")


def test_a_stream_ranks_by_them(run: Path, tiny_features_data: Path, tmp_path: Path) -> None:
    assert em3(["shard", str(tiny_features_data), "--count", "2", "--out", str(tmp_path / "shards")]) == 0
    options = ["--data", str(tiny_features_data), "--shards", str(tmp_path / "shards"), "--run", str(tmp_path / "live")]
    same = ["--loader.batch_size", "128", "--loader.max_history", "10", "--model.embedding_dim", "8"]
    assert em3(["follow", *options, "--start_from", str(run), *same]) == 0
    lines = [json.loads(line) for line in (tmp_path / "live" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["auc"] for line in lines if line["phase"] == "progressive"]
    assert len(measured) == 2
    assert min(measured) > 0.9
