"""Several labels: from thresholds or from the data set, through the prepared folder to batches."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets.raw_data import make_raw
from torchrec_em3.cli import run
from torchrec_em3.datasets.checks import check_raw
from torchrec_em3.datasets.indexing import index_dataset
from torchrec_em3.datasets.labels import task_columns
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError, DataError

NO_ENCODERS = {"text_encoder": "none", "image_encoder": "none"}
LIKE_LOVE = {"like": 4.0, "love": 5.0}
ROWS = len(make_raw().rating)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(make_raw(), tmp_path / "data", PrepareOptions(labels=LIKE_LOVE, **NO_ENCODERS))
    return tmp_path / "data"


def test_each_threshold_makes_a_column_and_the_first_is_plain_label(folder: Path) -> None:
    data = PreparedData.open(folder)
    rows = data.split_rows("train")
    assert data.tasks == ["like", "love"]
    assert data.label_columns == ["label", "label_love"] == task_columns("label", data.tasks)
    assert np.array_equal(rows["label"], rows["rating"] >= 4)
    assert np.array_equal(rows["label_love"], rows["rating"] >= 5)
    assert 0 < rows["label_love"].sum() < rows["label"].sum()
    assert data.meta["label_threshold"] == 4.0
    assert data.meta["tasks"][1] == {"name": "love", "label_threshold": 5.0}


def test_a_batch_holds_a_column_for_each_task(folder: Path) -> None:
    data = PreparedData.open(folder)
    stream = BatchStream(data, "test", batch_size=8, max_history=5)
    rows = data.split_rows("test")
    found = np.concatenate([batch.label[batch.weight > 0].numpy() for batch in stream])
    assert np.array_equal(found, np.stack([rows["label"], rows["label_love"]], axis=1))
    assert all(len(batch) == batch.label.shape[0] for batch in stream)


def test_one_label_is_written_as_ever(tmp_path: Path) -> None:
    for name, options in (("old", {"label_threshold": 4.0}), ("named", {"labels": {"like": 4.0}})):
        prepare(make_raw(), tmp_path / name, PrepareOptions(**options, **NO_ENCODERS))
    old, named = (PreparedData.open(tmp_path / name) for name in ("old", "named"))
    assert old.meta["content_hash"] == named.meta["content_hash"]
    assert (old.tasks, named.tasks) == (["label"], ["like"])
    for data in (old, named):
        assert next(iter(BatchStream(data, "train", batch_size=8, max_history=5))).label.shape == (8,)


def test_a_folder_from_before_there_were_tasks_has_one(tmp_path: Path) -> None:
    prepare(make_raw(), tmp_path / "data", PrepareOptions(**NO_ENCODERS))
    path = tmp_path / "data" / "meta.json"
    meta = json.loads(path.read_text())
    written = meta.pop("tasks")
    path.write_text(json.dumps(meta))
    data = PreparedData.open(tmp_path / "data")
    assert data.tasks == ["label"]
    assert data.meta["tasks"] == written
    assert len(data.split_rows("train")["label"]) == meta["counts"]["train"]


def test_labels_of_the_data_set_follow_their_events() -> None:
    raw = make_raw()
    labels = {"click": (raw.rating > 2).astype(np.int64), "buy": raw.rating == 3}
    indexed = index_dataset(replace(raw, labels=labels), split="temporal", seed=0, label_threshold=4.0)
    assert indexed.tasks == {"click": None, "buy": None}
    assert np.array_equal(indexed.events["label"], indexed.events["rating"] > 2)
    assert np.array_equal(indexed.events["label_buy"], indexed.events["rating"] == 3)


def test_sampled_negatives_follow_positives_of_the_main_task_and_are_negative_in_all() -> None:
    raw = make_raw()
    one, two = (
        index_dataset(raw, split="temporal", seed=0, label_threshold=4.0, labels=labels, negatives=2).events
        for labels in ({}, LIKE_LOVE)
    )
    assert all(np.array_equal(two[name], column) for name, column in one.items())
    sampled = two["rating"] == 0
    assert sampled.any()
    assert not two["label_love"][sampled].any()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ({"click": np.zeros(3)}, DataError, rf"labels\['click'\] has shape \[3\], expected \[{ROWS}\] as user_id"),
        ({"click": np.full(ROWS, 2)}, DataError, r"row 0: labels\['click'\] is 2, must be 0 or 1"),
        ({"click": np.full(ROWS, np.nan)}, DataError, r"row 0: labels\['click'\] is nan, must be 0 or 1"),
        ({"a click": np.zeros(ROWS)}, ConfigError, "task 'a click' needs another name"),
    ],
)
def test_wrong_labels_are_refused(labels: dict[str, np.ndarray], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_raw(replace(make_raw(), labels=labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"like": float("nan")}, "option labels.like is nan, must be a finite number"),
        ({"Like": 4.0}, "task 'Like' needs another name: small letters"),
    ],
)
def test_wrong_options_are_refused(labels: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareOptions(labels=labels)


def test_labels_of_both_kinds_are_refused() -> None:
    raw = replace(make_raw(), labels={"click": np.zeros(ROWS)})
    with pytest.raises(ConfigError, match=r"has labels of its own \(click\), so --labels like, love would"):
        index_dataset(raw, split="temporal", seed=0, label_threshold=None, labels=LIKE_LOVE)


def test_a_damaged_label_of_any_task_is_refused(folder: Path) -> None:
    path = next((folder / "interactions").iterdir())
    table = pq.read_table(path)
    place = table.schema.get_field_index("label_love")
    values = table["label_love"].to_numpy().copy()
    values[3] = 2
    pq.write_table(table.set_column(place, "label_love", pa.array(values)), path)
    with pytest.raises(DataError, match=r"row 3 of split train: label_love is 2, outside 0\.\.1"):
        PreparedData.open(folder).split_rows("train")
    pq.write_table(table.remove_column(place), path)
    with pytest.raises(DataError, match="no column 'label_love'"):
        PreparedData.open(folder)


def test_on_the_command_line_the_first_named_is_the_main_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{event % 7}\t{event % 11}\t{1 + event % 5}\t{1000 + event}" for event in range(77)]
    (tmp_path / "u.data").write_text("\n".join(lines) + "\n")
    arguments = ["prepare", "movielens", "--source", str(tmp_path), "--text_encoder", "none", "--image_encoder", "none"]
    assert run([*arguments, "--out", str(tmp_path / "data"), "--labels.love", "5", "--labels.like", "4"]) == 0
    data = PreparedData.open(tmp_path / "data")
    assert data.tasks == ["love", "like"]
    assert np.array_equal(data.split_rows("train")["label"], data.split_rows("train")["rating"] == 5)
    assert run([*arguments, "--out", str(tmp_path / "other"), "--labels.love", "high"]) == 2
    assert "labels" in capsys.readouterr().err
