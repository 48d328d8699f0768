"""Parquet tables of one's own, in whatever types they come, and what is refused of them."""

import datetime as dt
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets.parquet_folder import read_parquet_folder
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.errors import ConfigError, DataError

UTC = dt.UTC
EVENTS = {
    "user_id": ["ann", "ann", "ben", "cem"],
    "item_id": ["mug", "cup", "mug", "jar"],
    "timestamp": [100, 160, 200, 290],
    "label": [1, 0, 1, 0],
}
ITEMS = {"item_id": ["mug", "cup"], "title": ["Blue <b>mug</b>", "Tea cup"], "category": ["mugs", None]}
USERS = {"user_id": ["ann", "cem"], "country": ["de", None], "age": [34, 52]}


def write(
    folder: Path,
    events: Any = EVENTS,
    items: Any = ITEMS,
    users: Any = None,
    types: dict[str, pa.DataType] | None = None,
) -> Path:
    for name, columns in {"events": events, "items": items, "users": users}.items():
        if columns is not None:
            table = pa.table(columns)
            for column, kind in (types or {}).items():
                if column in table.column_names:
                    place = table.column_names.index(column)
                    table = table.set_column(place, column, table[column].cast(kind))
            pq.write_table(table, folder / f"{name}.parquet")
    return folder


def test_events_items_and_users(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        raw = read_parquet_folder(write(tmp_path, users=USERS))
    assert raw.user_id.to_pylist() == EVENTS["user_id"]
    assert raw.item_id.to_pylist() == EVENTS["item_id"]
    assert raw.timestamp.tolist() == EVENTS["timestamp"]
    assert raw.labels["label"].tolist() == raw.rating.tolist() == EVENTS["label"]
    assert raw.items.item_id.tolist() == ["mug", "cup", "jar"]
    assert raw.items.title.tolist() == raw.items.text.tolist() == ["Blue mug", "Tea cup", ""]
    assert raw.items.category.tolist() == ["mugs", "", ""]
    assert raw.user_features == {"country": {"ann": "de"}, "age": {"ann": "34", "cem": "52"}}
    assert "lacks 1 items of the events (first: jar); they have no content" in caplog.text


@pytest.mark.parametrize(
    ("types", "events"),
    [
        ({"user_id": pa.large_string(), "item_id": pa.string()}, {}),
        ({"user_id": pa.dictionary(pa.int8(), pa.string()), "item_id": pa.dictionary(pa.int64(), pa.string())}, {}),
        ({"timestamp": pa.int32(), "label": pa.bool_()}, {}),
        ({"label": pa.float64()}, {}),
        (
            {"timestamp": pa.timestamp("us")},
            {"timestamp": [second * 1_000_000 + 999 for second in EVENTS["timestamp"]]},
        ),
        (
            {"timestamp": pa.timestamp("ns", "Europe/Berlin")},
            {"timestamp": [dt.datetime.fromtimestamp(second, UTC) for second in EVENTS["timestamp"]]},
        ),
    ],
    ids=["strings", "dictionaries", "small", "float", "microseconds", "zone"],
)
def test_types_of_columns_do_not_matter(tmp_path: Path, types: dict[str, pa.DataType], events: dict[str, Any]) -> None:
    raw = read_parquet_folder(write(tmp_path, EVENTS | events, types=types))
    assert raw.user_id.to_pylist() == EVENTS["user_id"]
    assert raw.item_id.to_pylist() == EVENTS["item_id"]
    assert raw.timestamp.tolist() == EVENTS["timestamp"]
    assert raw.labels["label"].tolist() == EVENTS["label"]


def test_numbers_are_ids_too(tmp_path: Path) -> None:
    raw = read_parquet_folder(
        write(
            tmp_path, EVENTS | {"item_id": [7, 10**12, 7, 10]}, {"item_id": [10**12, 7, 10], "title": ["a", "b", "c"]}
        )
    )
    assert raw.item_id.to_pylist() == ["7", "1000000000000", "7", "10"]
    assert raw.items.title.tolist() == ["a", "b", "c"]


def test_parts_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "events.parquet").unlink()
    (tmp_path / "events").mkdir()
    for number, rows in enumerate([slice(0, 2), slice(2, 4)]):
        part = pa.table({name: column[rows] for name, column in EVENTS.items()})
        pq.write_table(part, tmp_path / "events" / f"part-{number}.parquet")
    (tmp_path / "events" / "_SUCCESS").touch()
    (tmp_path / "events" / ".part-9.parquet").write_text("in the making")
    raw = read_parquet_folder(tmp_path)
    assert raw.user_id.to_pylist() == EVENTS["user_id"]
    assert raw.labels["label"].tolist() == EVENTS["label"]


def test_tasks_are_columns_and_a_rating_is_for_a_threshold(tmp_path: Path) -> None:
    events = {name: EVENTS[name] for name in ("user_id", "item_id", "timestamp")}
    write(tmp_path, events | {"click": [True, True, False, True], "like": [1, 0, 0, 0], "rating": [5, 3.5, 1, 2]})
    raw = read_parquet_folder(tmp_path, ("click", "like"))
    assert {name: label.tolist() for name, label in raw.labels.items()} == {"click": [1, 1, 0, 1], "like": [1, 0, 0, 0]}
    raw = read_parquet_folder(tmp_path)
    assert (raw.labels, raw.rating.tolist()) == ({}, [5, 3.5, 1, 2])


def test_dense_features_are_numbers_and_null_where_unknown(tmp_path: Path) -> None:
    write(tmp_path, EVENTS | {"hour": [8, 9, None, 23], "price": [1.5, float("nan"), 2.0, 1e9]})
    raw = read_parquet_folder(tmp_path, dense=("price", "hour"))
    assert list(raw.dense) == ["price", "hour"]
    np.testing.assert_equal(raw.dense["hour"], np.array([8, 9, np.nan, 23], dtype=np.float32))
    np.testing.assert_equal(raw.dense["price"], np.array([1.5, np.nan, 2.0, 1e9], dtype=np.float32))
    with pytest.raises(ConfigError, match="--dense hour,hour names a column twice"):
        read_parquet_folder(tmp_path, dense=("hour", "hour"))
    with pytest.raises(ConfigError, match="--dense names 'label', which is what shall be predicted"):
        read_parquet_folder(tmp_path, dense=("label",))
    with pytest.raises(DataError, match="item_id is of type string, expected a number"):
        read_parquet_folder(tmp_path, dense=("item_id",))


def test_pictures_are_named_or_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cup.png").touch()
    assert read_parquet_folder(write(tmp_path)).items.image.tolist() == ["", "cup.png", ""]
    raw = read_parquet_folder(write(tmp_path, items=ITEMS | {"image": ["a/x.jpg", None]}))
    assert (raw.items.image.tolist(), raw.image_root) == (["a/x.jpg", "", ""], tmp_path / "images")


def test_prepares_what_the_same_data_in_memory_does(tmp_path: Path) -> None:
    raw = make_raw()
    columns = {name: getattr(raw.items, name) for name in ("item_id", "title", "text", "image", "category")}
    events = {name: getattr(raw, name) for name in ("user_id", "item_id", "rating", "timestamp")}
    taste = raw.user_features["taste"]
    write(tmp_path, events, columns, {"user_id": list(taste), "taste": list(taste.values())})
    options = PrepareOptions(text_encoder="tiny_text", image_encoder="none")
    kept = prepare(raw, tmp_path / "kept", options)
    read = prepare(read_parquet_folder(tmp_path), tmp_path / "read", options)
    assert read["content_hash"] == kept["content_hash"]


def _events(**columns: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, {name: column for name, column in (EVENTS | columns).items() if column})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "neither events.parquet nor events/*.parquet is there"),
        (lambda folder: write(folder, items=None), "neither items.parquet nor items/*.parquet is there"),
        (
            _events(user_id=None, user=["a", "b", "c", "d"]),
            "no column 'user_id' among item_id, timestamp, label, user.",
        ),
        (_events(user_id=[1.0, 2.0, 3.0, 4.0]), "user_id is of type double, expected a string or an integer"),
        (_events(timestamp=["a", "b", "c", "d"]), "timestamp is of type string, expected a timestamp, or seconds"),
        (_events(timestamp=[1, None, 3, None]), "row 1: timestamp is null (2 such rows)"),
        (_events(label=[1, 0, 256, 0]), "row 2: label is 256, must be 0 or 1"),
        (_events(label=[1, 0, None, 0]), "row 2: label is null (1 such rows)"),
        (_events(label=None, clicked=[1, 0, 1, 0]), "name the columns of 0 and 1 that shall be predicted with --tasks"),
        (
            lambda folder: write(folder, items=ITEMS | {"item_id": ["mug", "mug"]}),
            "row 1: item_id 'mug' stands in row 0",
        ),
        (lambda folder: write(folder, items=ITEMS | {"item_id": ["mug", None]}), "row 1: item_id is null"),
        (
            lambda folder: write(folder, items=ITEMS | {"title": [1.5, 2.5]}),
            "title is of type double, expected a string",
        ),
        (lambda folder: (write(folder) / "items.parquet").write_bytes(b"PAR1"), "cannot be read as Parquet"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        read_parquet_folder(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_without_rows_has_no_events(tmp_path: Path) -> None:
    write(tmp_path)
    pq.write_table(pa.table(EVENTS).slice(0, 0), tmp_path / "events.parquet")
    with pytest.raises(DataError, match="no events; a data set needs at least one"):
        prepare(read_parquet_folder(tmp_path), tmp_path / "out", PrepareOptions())


def test_tasks_and_pictures_that_cannot_be(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match="--tasks label,label names a column twice"):
        read_parquet_folder(tmp_path, ("label", "label"))
    with pytest.raises(DataError, match=r"no column 'labels'.*Did you mean 'label'"):
        read_parquet_folder(tmp_path, ("labels",))
    with pytest.raises(DataError, match="gone: not a folder"):
        read_parquet_folder(tmp_path, images=tmp_path / "gone")


def test_ids_of_all_batches_share_one_dictionary(tmp_path: Path) -> None:
    user = np.random.default_rng(0).integers(0, 5000, 300_000)
    table = pa.table({"user_id": user, "item_id": user % 7, "timestamp": np.arange(len(user)), "label": user % 2})
    pq.write_table(table, tmp_path / "events.parquet", row_group_size=50_000)
    write(tmp_path, events=None, items={"item_id": list(range(7))})
    raw = read_parquet_folder(tmp_path)
    assert raw.user_id.type == pa.dictionary(pa.int32(), pa.string())
    assert len(raw.user_id.dictionary) == len(np.unique(user))
    assert [int(value) for value in raw.user_id.take(pa.array([0, 123_456, 299_999])).to_pylist()] == [
        int(user[place]) for place in (0, 123_456, 299_999)
    ]


def test_a_time_beyond_int64_is_refused(tmp_path: Path) -> None:
    events = EVENTS | {"timestamp": pa.array([100, 160, 200, 2**63], pa.uint64())}
    with pytest.raises(DataError, match=r"events.parquet: cannot be read as Parquet \(.*9223372036854775808"):
        read_parquet_folder(write(tmp_path, events=events))


@pytest.mark.parametrize(("table", "column"), [("events", "user_id"), ("items", "title")])
def test_strings_that_are_not_utf8_are_refused(tmp_path: Path, table: str, column: str) -> None:
    tables = {"events": EVENTS, "items": ITEMS}
    broken = pa.array([b"\xff\xfe"] * len(tables[table][column]), pa.binary()).view(pa.string())
    tables[table] = tables[table] | {column: broken}
    with pytest.raises(DataError, match=rf"{table}.parquet: cannot be read as Parquet \(.*UTF8"):
        read_parquet_folder(write(tmp_path, **tables))
