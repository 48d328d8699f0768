"""A stream's histories equal those of the prepared folder, however its events are cut into shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw_ids import user_ids
from torchrec_em3.datasets.recent_events import RecentEvents, ShardRows
from torchrec_em3.datasets.shards import read_shard, split_into_shards

MAX_HISTORY = 7


def histories(rows: PreparedData | ShardRows) -> list[list[int]]:
    """Return the last items before each row of the test split."""
    columns = rows.split_rows("test")
    start = np.maximum(rows.history_offsets[columns["user"]], columns["history_end"] - MAX_HISTORY)
    return [rows.history_items[a:b].tolist() for a, b in zip(start, columns["history_end"], strict=True)]


def table(events: list[tuple[str, str, int]]) -> pa.Table:
    users, items, times = zip(*events, strict=True)
    labels = pa.array([1] * len(events), type=pa.int8())
    return pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.int64()), "label": labels})


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("through_files", [False, True])
def test_shards_of_the_test_split_have_its_histories(
    tiny_data: Path, tmp_path: Path, count: int, through_files: bool
) -> None:
    data = PreparedData.open(tiny_data)
    paths = split_into_shards(data, "test", count, tmp_path / "shards")
    shards = [read_shard(path, data.tasks) for path in paths]
    memory = RecentEvents(data, MAX_HISTORY)
    memory.start(before=shards[0]["timestamp"][0].as_py())
    found, users, first_seen = [], [], []
    for shard in shards:
        rows = memory.open(shard)
        found += histories(rows)
        users += rows.columns["user"].tolist()
        first_seen += rows.columns["item"][rows.first_seen].tolist()
        memory.add(shard, rows)
        if through_files:
            memory.write(tmp_path / "memory.npz")
            memory = RecentEvents(data, MAX_HISTORY)
            memory.read(tmp_path / "memory.npz")
    assert found == histories(data)
    assert users == data.split_rows("test")["user"].tolist()
    assert any(found)
    before = {*data.split_rows("train")["item"].tolist(), *data.split_rows("validation")["item"].tolist()}
    assert set(first_seen) == set(data.split_rows("test")["item"].tolist()) - before


def test_new_users_have_histories_and_strange_items_are_row_0(tiny_data: Path, tmp_path: Path) -> None:
    data = PreparedData.open(tiny_data)
    mug, cup = (data.items["raw_id"][row].as_py() for row in (3, 5))
    memory = RecentEvents(data, MAX_HISTORY)
    memory.start(before=10**10)
    first = table([("new", mug, 10**10), ("newer", cup, 10**10), ("new", "strange", 10**10 + 1)])
    rows = memory.open(first)
    new, newer = data.user_rows, data.user_rows + 1
    assert rows.columns["user"].tolist() == [new, newer, new]
    assert rows.columns["item"].tolist() == [3, 5, 0]
    assert histories(rows) == [[], [], [3]]
    assert rows.user_features.shape[0] == data.user_rows + 2
    assert not rows.user_features[data.user_rows :].any()
    memory.add(first, rows)
    memory.write(tmp_path / "memory.npz")
    memory = RecentEvents(data, MAX_HISTORY)
    memory.read(tmp_path / "memory.npz")
    again = memory.open(table([("newer", mug, 10**10 + 5), ("newest", mug, 10**10 + 5), ("new", mug, 10**10 + 6)]))
    assert again.columns["user"].tolist() == [newer, newer + 1, new]
    assert histories(again) == [[5], [], [3, 0]]


def test_a_new_user_has_one_raw_id_in_every_shard(tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    mug, old = data.items["raw_id"][3].as_py(), data.users["raw_id"][1].as_py()
    memory = RecentEvents(data, MAX_HISTORY)
    memory.start(before=10**10)
    delivered = []
    for time in (10**10, 10**10 + 9):
        events = table([("newer", mug, time)] * (time > 10**10) + [("new", mug, time + 1), (old, mug, time + 2)])
        rows = memory.open(events)
        (batch,) = BatchStream(rows, "test", batch_size=8, max_history=MAX_HISTORY, raw_users=True)
        delivered.append(batch.sparse[data.user_feature_names[0]].values()[-2:].tolist())
        memory.add(events, rows)
    assert delivered[0] == delivered[1]
    assert delivered[0][1] == user_ids(data)[1]
    assert delivered[0][0] not in user_ids(data)


def test_events_of_one_instant_do_not_see_each_other(tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    ids = data.items["raw_id"].to_pylist()
    memory = RecentEvents(data, MAX_HISTORY)
    memory.start(before=10**10)
    rows = memory.open(table([("new", ids[1], 10**10), ("new", ids[2], 10**10), ("new", ids[4], 10**10 + 1)]))
    assert histories(rows) == [[], [], [1, 2]]
