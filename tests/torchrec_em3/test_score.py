"""`em3 score`: scores are the model's, whatever the row order; a bad row is one line and leaves nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.torchrec_em3.packages import export, train
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.export_parity import split_requests
from torchrec_em3.serving import batch
from torchrec_em3.serving.scorer import Request, Scorer


@pytest.fixture(scope="module")
def package(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    return export(train(tiny_data, folder / "run"), folder / "package", "fp32")


def rows(requests: list[Request]) -> dict[str, list[Any]]:
    return {
        "user": [request.user for request in requests],
        "history": [list(request.history) for request in requests],
        "item": [request.candidates[0] for request in requests],
    }


def test_rows_are_scored_as_the_model_scores_them(
    package: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ROWS_AT_A_TIME", 100)
    requests = [request for part in split_requests(PreparedData.open(tiny_data), "test", 10) for request in part]
    evaluated = np.load(package.parent / "run" / "predictions" / "test.npz")
    pq.write_table(pa.table({"day": range(len(requests)), **rows(requests)}), tmp_path / "in.parquet")
    assert em3(["score", str(package), str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["day", "user", "history", "item", "score"]
    assert table.drop_columns(["score"]).equals(pq.read_table(tmp_path / "in.parquet"))
    np.testing.assert_allclose(table["score"].to_numpy(), 1 / (1 + np.exp(-evaluated["logit"])), atol=1e-5)


def test_ids_may_be_integers_and_rows_of_one_history_share_a_request(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ROWS_A_REQUEST", 4)
    scorer = Scorer.load(package)
    known = scorer.config.user_features[1:]
    items = list(range(1, 11))
    table = pa.table(
        {"user": [1] * 10, "history": [[3, 4]] * 10, "item": items, **{name: ["?"] * 10 for name in known}}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    sizes: list[int] = []
    score = Scorer.score
    monkeypatch.setattr(
        Scorer,
        "score",
        lambda self, requests: [sizes.append(len(r.candidates)) for r in requests] and score(self, requests),
    )
    assert batch.score_file(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet") == 10
    assert sizes == [4, 4, 2]
    unknown = dict.fromkeys(known, "?")
    (expected,) = score(scorer, [Request("1", ["3", "4"], list(map(str, items)), unknown)])
    np.testing.assert_allclose(pq.read_table(tmp_path / "out.parquet")["score"].to_numpy(), expected, atol=1e-6)


GOOD = {"user": ["1", "2"], "history": [["1"], []], "item": ["1", "2"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": ["1", None]}, "row 1: user is null"),
        ({"item": [None, "1"]}, "row 0: item is null"),
        ({"history": [["1"], None]}, "row 1: history is null"),
        ({"history": [["1", None], []]}, "row 0: history is null or holds a null"),
        ({"history": ["1", "2"]}, "column 'history' is string, expected a list"),
        ({"item": [1.5, 2.5]}, "column 'item' is double"),
        ({"item": [None, None]}, "row 0: item is null"),
        ({"history": [[None], []]}, "row 0: history is null or holds a null"),
        ({"history": [None, None]}, "row 0: history is null"),
        ({"score": [0.0, 0.0]}, "has a column 'score' already"),
        ({"item": None}, "0 columns 'item', expected 1; columns: user, history"),
    ],
)
def test_bad_rows_are_one_line_and_nothing_is_written(
    change: dict[str, Any], message: str, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {name: values for name, values in (GOOD | change).items() if values is not None}
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table(columns), source)
    assert em3(["score", str(package), str(source), str(target)]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == [source]


def test_files_that_are_none(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    assert em3(["score", str(package), str(source), str(target)]) == 3
    source.write_text("no parquet")
    assert em3(["score", str(package), str(source), str(target)]) == 3
    assert em3(["score", str(tmp_path), str(source), str(target)]) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
    pq.write_table(pa.table(GOOD).slice(0, 0), source)
    assert em3(["score", str(package), str(source), str(target)]) == 0
    assert pq.read_table(target).num_rows == 0


@pytest.mark.parametrize("place", ["in.parquet/out.parquet", "nowhere/out.parquet", "."])
def test_a_file_that_cannot_be_written_is_one_line(
    place: str, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / place
    pq.write_table(pa.table(GOOD), source)
    assert em3(["score", str(package), str(source), str(target)]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{source} to {target}: " in line
    assert list(tmp_path.iterdir()) == [source]
