"""`em3 prepare parquet`, `amazon` and `sequences` as they are called, from raw files to a prepared folder."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets.amazon_data import put, write_2018
from torchrec_em3.cli import run
from torchrec_em3.datasets.prepared import PreparedData

TINY = ("--plugins", "tests.tiny_parts", "--text_encoder", "tiny_text", "--image_encoder", "none")


def em3(*arguments: object) -> int:
    try:
        return run([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def meta_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())


def test_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = {"user_id": [row % 7 for row in range(200)], "item_id": [row * 5 % 13 for row in range(200)]}
    events |= {"timestamp": list(range(200)), "click": [row % 2 for row in range(200)], "buy": [0] * 199 + [1]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    pq.write_table(
        pa.table({"item_id": list(range(12)), "title": [f"mug {i}" for i in range(12)]}), tmp_path / "items.parquet"
    )
    arguments = ["prepare", "parquet", "--source", tmp_path, *TINY]
    assert em3(*arguments, "--out", tmp_path / "data", "--tasks", "click,buy") == 0
    told = capsys.readouterr()
    assert "200 events of 7 users on 13 items; train 160, validation 20, test 20 (temporal)" in told.out
    assert "items.parquet: lacks 1 items of the events (first: 12)" in told.err
    assert "text: 12 items, 1 without" in told.out
    data = PreparedData.open(tmp_path / "data")
    assert data.tasks == ["click", "buy"]
    assert data.split_rows("test")["label_buy"].tolist() == [0] * 19 + [1]
    assert em3(*arguments, "--out", tmp_path / "other") == 3
    assert "events.parquet: neither 'label' nor 'rating' among user_id" in capsys.readouterr().err
    assert em3(*arguments, "--out", tmp_path / "other", "--tasks", "click,bought") == 3
    assert "no column 'bought' among" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_amazon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_2018(tmp_path)
    arguments = ["prepare", "amazon", "--source", tmp_path, *TINY]
    assert em3(*arguments, "--out", tmp_path / "data", "--split", "leave_last") == 0
    assert "5 events of 3 users on 3 items; train" in capsys.readouterr().out
    meta = meta_of(tmp_path / "data")
    assert (meta["split"], meta["label_threshold"], meta["negatives"]["rows"]) == ("leave_last", 4.0, 0)
    assert em3(*arguments, "--out", tmp_path / "more", "--negatives", 1) == 0
    assert "of 2 negatives could not be drawn" in capsys.readouterr().err
    assert meta_of(tmp_path / "more")["negatives"]["per_positive"] == 1
    assert em3(*arguments, "--out", tmp_path / "other", "--reviews", "meta_Beauty.json") == 3
    assert "meta_Beauty.json: holds no Amazon reviews" in capsys.readouterr().err
    assert em3(*arguments, "--out", tmp_path / "other", "--download.max_seconds", 0) == 2
    assert "option download.max_seconds is 0" in capsys.readouterr().err


def test_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"u{user} " + " ".join(f"i{(user + step) % 17}" for step in range(5)) for user in range(30)]
    put(tmp_path / "user_sequence.txt", "\n".join(lines) + "\n")
    arguments = ["prepare", "sequences", "--source", tmp_path, *TINY]
    assert em3(*arguments, "--out", tmp_path / "data") == 0
    assert "150 events of 30 users on 17 items and 600 sampled negatives" in capsys.readouterr().out
    meta = meta_of(tmp_path / "data")
    assert (meta["split"], meta["label_threshold"], meta["time_cuts"]) == ("leave_last", None, None)
    rows = PreparedData.open(tmp_path / "data").split_rows("test")
    assert (len(rows["label"]), rows["label"].sum()) == (150, 30)
    put(tmp_path / "codes.json", json.dumps({f"i{item}": [item, 3] for item in range(16)}))
    put(tmp_path / "Made.index_found.json", json.dumps({f"i{item}": [f"<a_{item}>"] for item in range(17)}))
    assert em3(*arguments, "--out", tmp_path / "coded", "--codes", "given=codes.json") == 0
    assert "given: codes of 16 items, 1 without (2 levels of 16, codes.json)" in capsys.readouterr().out
    assert list(meta_of(tmp_path / "coded")["codes"]) == ["given"]
    assert em3(*arguments, "--out", tmp_path / "found") == 0
    assert meta_of(tmp_path / "found")["codes"]["found"]["levels"] == 1
    for wrong, code, message in (
        (("--codes", "codes.json"), 2, "--codes codes.json must be NAME=FILE"),
        (("--codes", "text=codes.json"), 3, "codes 'text' need another name"),
        (("--codes", "given=gone.json"), 3, "gone.json: cannot be read"),
        (("--split", "temporal"), 2, "use --split leave_last"),
        (("--negatives", "0"), 2, "--negatives is 0, must be at least 1"),
        (("--negative_sampling", "popularty"), 2, "Did you mean 'popularity'"),
        (("--label_threshold", "3"), 2, "--label_threshold"),
    ):
        capsys.readouterr()
        assert em3(*arguments, "--out", tmp_path / "other", *wrong) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
