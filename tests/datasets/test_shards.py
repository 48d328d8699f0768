"""Shards: what is written is read, in order and with its instants together; what is wrong is refused in one line."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.shards import END_FILE, list_shards, read_shard, split_into_shards, write_shard
from torchrec_em3.errors import ConfigError, DataError


def columns(**other: Any) -> dict[str, Any]:
    return {
        "user_id": np.array(["ann", "ben", "ann"]),
        "item_id": np.array(["mug", "cup", "jar"]),
        "timestamp": np.array([5, 5, 9]),
        "label": np.array([1, 0, 1], dtype=np.int8),
        **other,
    }


def test_the_shards_of_a_split_are_its_events_in_order(tiny_tasks_data: Path, tmp_path: Path) -> None:
    data = PreparedData.open(tiny_tasks_data)
    out = tmp_path / "shards"
    paths = split_into_shards(data, "test", 4, out)
    assert [path.name for path in paths] == list_shards(out)
    assert (out / END_FILE).exists()
    tables = [read_shard(path, data.tasks) for path in paths]
    expected = data.split_rows("test")
    whole = pa.concat_tables(tables)
    users, items = (table["raw_id"].to_numpy() for table in (data.users, data.items))
    assert (whole["user_id"].to_numpy() == users[expected["user"]]).all()
    assert (whole["item_id"].to_numpy() == items[expected["item"]]).all()
    for name in ("timestamp", "label", "label_like"):
        assert (whole[name].to_numpy() == expected[name]).all()
    assert len(tables) == 4
    assert max(table.num_rows for table in tables) - min(table.num_rows for table in tables) < 5
    for before, after in itertools.pairwise(tables):
        assert before["timestamp"][-1].as_py() < after["timestamp"][0].as_py()
    with pytest.raises(DataError, match="holds shards already"):
        split_into_shards(data, "test", 4, out)


def test_a_folder_with_sampled_negatives_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    data = PreparedData.open(tiny_data)
    data = PreparedData(data.folder, {**data.meta, "negatives": {"rows": 3}})
    with pytest.raises(ConfigError, match="has sampled negatives"):
        split_into_shards(data, "test", 4, tmp_path)


def test_shards_do_not_go_where_a_file_is(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").touch()
    with pytest.raises(DataError, match="shards: is a file"):
        split_into_shards(PreparedData.open(tiny_data), "test", 2, tmp_path / "shards")


def test_unfinished_and_other_files_are_no_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.parquet", columns())
    write_shard(tmp_path / "a.parquet", columns())
    for name in (".c.parquet", "_d.parquet", ".e.parquet.tmp", "f.txt", END_FILE):
        (tmp_path / name).touch()
    assert list_shards(tmp_path) == ["a.parquet", "b.parquet"]
    with pytest.raises(DataError, match="no such folder"):
        list_shards(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": np.array([1, 0, 2], dtype=np.int8)}, "row 2: label is 2, must be 0 or 1"),
        ({"timestamp": np.array([5, 4, 9])}, "row 1: timestamp decreases"),
        ({"timestamp": np.array([5, 5, 9], dtype=np.int32)}, "column 'timestamp' is int32, expected int64"),
        ({"user_id": pa.array(["ann", None, "ann"])}, "row 1: user_id is null"),
        ({"item_id": pa.array(["mug", "cup", ""])}, "row 2: item_id is empty"),
        ({name: value[:0] for name, value in columns().items()}, "no rows"),
    ],
)
def test_what_is_wrong_in_a_shard_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    write_shard(tmp_path / "a.parquet", columns(**wrong))
    with pytest.raises(DataError, match=rf"a\.parquet:? {message}"):
        read_shard(tmp_path / "a.parquet", ["label"])


def test_a_damaged_shard_and_a_missing_task_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, columns())
    with pytest.raises(DataError, match="no column 'label_like'"):
        read_shard(path, ["click", "like"])
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated or damaged"):
        read_shard(path, ["label"])
