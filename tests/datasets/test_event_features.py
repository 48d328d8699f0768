"""Features of events from raw data to batches and shards: what training events do not show is unknown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets.checks import check_raw
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.recent_events import RecentEvents
from torchrec_em3.datasets.shards import feature_types, read_shard, split_into_shards
from torchrec_em3.errors import DataError
from torchrec_em3.schema import DenseFeature, SparseFeature


def make_features() -> RawDataset:
    """`since`, which grows with time and is unknown now and then, `hour`, and `device`, of which one comes late."""
    raw = make_raw()
    since = raw.timestamp + np.random.default_rng(1).random(len(raw.timestamp))
    since[::5] = np.nan
    device = np.array(["phone", "tablet", "", "desk"], dtype=object)[raw.timestamp % 4]
    device[raw.timestamp > np.quantile(raw.timestamp, 0.85)] = "watch"
    dense = {"since": since, "hour": (raw.timestamp % 24).astype(np.float32)}
    return replace(raw, dense=dense, sparse={"device": pa.array(device).dictionary_encode()})


def prepare_features(folder: Path, raw: RawDataset, **options: Any) -> PreparedData:
    prepare(raw, folder, PrepareOptions(text_encoder="none", image_encoder="none", **options))
    return PreparedData.open(folder)


def test_mean_and_deviation_are_those_of_known_training_events(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    rows = data.split_rows("train")
    assert [feature.name for feature in data.dense_features] == ["since", "hour"]
    for feature in data.dense_features:
        values = rows[f"dense_{feature.name}"].astype(np.float64)
        assert (feature.mean, feature.std) == (pytest.approx(np.nanmean(values)), pytest.approx(np.nanstd(values)))
    later = data.split_rows("test")["dense_since"]
    assert np.nanmin(later) > np.nanmax(rows["dense_since"]), "test events must not be in the mean"
    assert np.isnan(later).any()


def test_values_stay_with_their_events(tmp_path: Path) -> None:
    raw = make_features()
    data = prepare_features(tmp_path / "data", raw)
    users, items = (table["raw_id"].to_numpy(zero_copy_only=False) for table in (data.users, data.items))
    hour, since = raw.dense["hour"], raw.dense["since"].astype(np.float32)
    device = raw.sparse["device"].to_pylist()
    place_of = {
        (user, item, int(time)): place
        for place, (user, item, time) in enumerate(zip(raw.user_id, raw.item_id, raw.timestamp, strict=True))
    }
    rows, devices = data.split_rows("validation"), data.vocabulary("device")
    for place, (user, item, time) in enumerate(zip(rows["user"], rows["item"], rows["timestamp"], strict=True)):
        given = place_of[users[user], items[item], int(time)]
        assert devices[rows["sparse_device"][place]] == (device[given] if device[given] in devices else "")
        assert rows["dense_hour"][place] == hour[given]
        np.testing.assert_equal(rows["dense_since"][place], since[given])


def test_values_that_no_training_event_has_are_unknown(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    assert data.sparse_features == [SparseFeature("device", 4)]
    assert data.vocabulary("device") == ["", "desk", "phone", "tablet"]
    assert set(data.split_rows("train")["sparse_device"]) == {0, 1, 2, 3}
    assert set(data.split_rows("test")["sparse_device"]) == {0}, "all of them are by watch"


def test_nulls_are_unknown_whatever_the_form(tmp_path: Path) -> None:
    values = [None if place % 3 == 0 else "ab"[place % 2] for place in range(len(make_raw().rating))]
    empty = np.array([value or "" for value in values])
    rows = [
        prepare_features(tmp_path / str(number), replace(make_raw(), sparse={"which": given})).split_rows("train")
        for number, given in enumerate([pa.array(values).dictionary_encode(), empty])
    ]
    assert rows[0]["sparse_which"].tolist() == rows[1]["sparse_which"].tolist()
    assert set(rows[0]["sparse_which"]) == {0, 1, 2}


def test_a_row_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    fewer = PreparedData(data.folder, {**data.meta, "sparse": [{"name": "device", "rows": 3}]})
    with pytest.raises(DataError, match=r"of split train: sparse_device is 3, outside 0\.\.2"):
        fewer.split_rows("train")
    (data.folder / "vocab" / "device.parquet").unlink()
    with pytest.raises(DataError, match=r"vocab/device\.parquet"):
        PreparedData.open(data.folder)


def test_batches_hold_them_in_standard_deviations(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    (batch,) = BatchStream(data, "test", batch_size=1000, max_history=3)
    assert batch.dense.dtype == torch.float32
    for place, feature in enumerate(data.dense_features):
        values = data.split_rows("test")[f"dense_{feature.name}"]
        expected = np.where(np.isnan(values), 0.0, (values - feature.mean) / feature.std)
        np.testing.assert_allclose(batch.dense[:, place], expected, rtol=1e-5, atol=1e-6)


def test_batches_hold_categories_between_user_and_target(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    (batch,) = BatchStream(data, "validation", batch_size=1000, max_history=3)
    assert batch.sparse.keys() == ["user", "taste", "device", "target", "history"]
    assert batch.sparse["device"].values().tolist() == data.split_rows("validation")["sparse_device"].tolist()
    assert batch.sparse["target"].values().tolist() == data.split_rows("validation")["item"].tolist()


def test_sampled_negatives_have_those_of_their_positive(tmp_path: Path) -> None:
    raw = replace(make_features(), rating=np.ones(len(make_raw().rating), dtype=np.float32))
    data = prepare_features(tmp_path / "data", raw, label_threshold=1.0, negatives=2)
    rows = data.split_rows("train")
    positive = np.flatnonzero(rows["label"] == 1)
    given = {
        (user, time, end): set()
        for user, time, end in zip(rows["user"], rows["timestamp"], rows["history_end"], strict=True)
    }
    for place in positive:
        key = rows["user"][place], rows["timestamp"][place], rows["history_end"][place]
        given[key].add((rows["dense_hour"][place], rows["sparse_device"][place]))
    negatives = np.flatnonzero(rows["label"] == 0)
    assert len(negatives) > len(positive)
    for place in negatives:
        key = rows["user"][place], rows["timestamp"][place], rows["history_end"][place]
        assert (rows["dense_hour"][place], rows["sparse_device"][place]) in given[key]


def test_shards_hold_them_and_a_stream_reads_them_alike(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    paths = split_into_shards(data, "validation", 1, tmp_path / "shards")
    table = read_shard(paths[0], data.tasks, feature_types(data))
    memory = RecentEvents(data, 3)
    memory.start(before=table["timestamp"][0].as_py())
    (from_shard,) = BatchStream(memory.open(table), "validation", batch_size=1000, max_history=3)
    (from_folder,) = BatchStream(data, "validation", batch_size=1000, max_history=3)
    assert from_shard.dense.tolist() == from_folder.dense.tolist()
    assert from_shard.sparse.keys() == from_folder.sparse.keys()
    assert from_shard.sparse["device"].values().tolist() == from_folder.sparse["device"].values().tolist()
    with pytest.raises(DataError, match="no column 'dense_price'"):
        read_shard(paths[0], data.tasks, {"dense_price": pa.float32()})


def test_values_that_a_shard_brings_for_the_first_time_are_unknown(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_features())
    (path,) = split_into_shards(data, "validation", 1, tmp_path / "shards")
    table = read_shard(path, data.tasks, feature_types(data))
    values = pa.array(["phone", None, "", "glasses"] * len(table))[: len(table)]
    place = table.column_names.index("sparse_device")
    rows = RecentEvents(data, 3).open(table.set_column(place, "sparse_device", pa.chunked_array([values])))
    assert rows.columns["sparse_device"][:4].tolist() == [2, 0, 0, 0]


def test_a_folder_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    data = prepare_features(tmp_path / "data", make_raw())
    assert data.meta["dense"] == data.meta["sparse"] == []
    earlier = PreparedData(data.folder, {k: value for k, value in data.meta.items() if k not in ("dense", "sparse")})
    assert earlier.dense_features == earlier.sparse_features == []
    (batch,) = BatchStream(earlier, "test", batch_size=1000, max_history=3)
    assert list(batch.dense.shape) == [len(batch.label), 0]


def test_a_value_that_never_changes_is_0_and_one_that_is_never_known_is_refused(tmp_path: Path) -> None:
    raw = make_raw()
    always = np.full(len(raw.rating), 7.0)
    data = prepare_features(tmp_path / "data", replace(raw, dense={"always": always}))
    assert data.dense_features == [DenseFeature("always", 7.0, 1.0)]
    never = replace(raw, dense={"never": np.full(len(raw.rating), np.nan)})
    with pytest.raises(DataError, match="dense feature 'never' is unknown in all"):
        prepare_features(tmp_path / "other", never)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("kind", "name", "values", "message"),
    [
        ("dense", "hour", np.array([1.0, np.inf]), r"row 1: dense\['hour'\] is inf, must be finite, or NaN if unknown"),
        ("dense", "hour", np.array([1, 2]), r"dense\['hour'\] is int64 \[2\], expected floating point \[2\]"),
        ("dense", "hour", np.array([1.0]), r"dense\['hour'\] is float64 \[1\], expected floating point \[2\]"),
        ("dense", "Hour", np.array([1.0, 2.0]), "dense feature 'Hour' needs another name"),
        ("dense", "taste", np.array([1.0, 2.0]), "dense feature 'taste' needs another name"),
        ("sparse", "target", np.array(["a", "b"]), "sparse feature 'target' needs another name"),
        ("sparse", "device", np.array(["a"]), r"sparse\['device'\] is <U1 \[1\], expected str \[2\]"),
        ("sparse", "device", np.array([1, 2]), r"sparse\['device'\] is int64 \[2\], expected str \[2\]"),
    ],
)
def test_what_is_refused(kind: str, name: str, values: np.ndarray, message: str) -> None:
    raw = make_raw()
    two = {column: getattr(raw, column)[:2] for column in ("user_id", "item_id", "rating", "timestamp")}
    with pytest.raises(DataError, match=message):
        check_raw(replace(raw, **two, **{kind: {name: values}}))
