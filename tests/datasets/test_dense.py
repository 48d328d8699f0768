"""Dense features from raw data to batches and shards: measured on training events, unknown values the mean."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.recent_events import RecentEvents
from torchrec_em3.datasets.shards import read_shard, split_into_shards
from torchrec_em3.errors import DataError
from torchrec_em3.schema import DenseFeature


def make_dense() -> RawDataset:
    """Two features: `since`, which grows with time and is unknown now and then, and `hour`."""
    raw = make_raw()
    since = raw.timestamp + np.random.default_rng(1).random(len(raw.timestamp))
    since[::5] = np.nan
    return replace(raw, dense={"since": since, "hour": (raw.timestamp % 24).astype(np.float32)})


def prepare_dense(folder: Path, raw: RawDataset, **options: Any) -> PreparedData:
    prepare(raw, folder, PrepareOptions(text_encoder="none", image_encoder="none", **options))
    return PreparedData.open(folder)


def test_mean_and_deviation_are_those_of_known_training_events(tmp_path: Path) -> None:
    data = prepare_dense(tmp_path / "data", make_dense())
    rows = data.split_rows("train")
    assert [feature.name for feature in data.dense_features] == ["since", "hour"]
    for feature in data.dense_features:
        values = rows[f"dense_{feature.name}"].astype(np.float64)
        assert (feature.mean, feature.std) == (pytest.approx(np.nanmean(values)), pytest.approx(np.nanstd(values)))
    later = data.split_rows("test")["dense_since"]
    assert np.nanmin(later) > np.nanmax(rows["dense_since"]), "test events must not be in the mean"
    assert np.isnan(later).any()


def test_values_stay_with_their_events(tmp_path: Path) -> None:
    raw = make_dense()
    data = prepare_dense(tmp_path / "data", raw)
    users, items = (table["raw_id"].to_numpy(zero_copy_only=False) for table in (data.users, data.items))
    hour, since = raw.dense["hour"], raw.dense["since"].astype(np.float32)
    place_of = {
        (user, item, int(time)): place
        for place, (user, item, time) in enumerate(zip(raw.user_id, raw.item_id, raw.timestamp, strict=True))
    }
    rows = data.split_rows("validation")
    for place, (user, item, time) in enumerate(zip(rows["user"], rows["item"], rows["timestamp"], strict=True)):
        given = place_of[users[user], items[item], int(time)]
        assert rows["dense_hour"][place] == hour[given]
        np.testing.assert_equal(rows["dense_since"][place], since[given])


def test_batches_hold_them_in_standard_deviations(tmp_path: Path) -> None:
    data = prepare_dense(tmp_path / "data", make_dense())
    (batch,) = BatchStream(data, "test", batch_size=1000, max_history=3)
    assert batch.dense.dtype == torch.float32
    for place, feature in enumerate(data.dense_features):
        values = data.split_rows("test")[f"dense_{feature.name}"]
        expected = np.where(np.isnan(values), 0.0, (values - feature.mean) / feature.std)
        np.testing.assert_allclose(batch.dense[:, place], expected, rtol=1e-5, atol=1e-6)


def test_sampled_negatives_have_those_of_their_positive(tmp_path: Path) -> None:
    raw = replace(make_dense(), rating=np.ones(len(make_raw().rating), dtype=np.float32))
    data = prepare_dense(tmp_path / "data", raw, label_threshold=1.0, negatives=2)
    rows = data.split_rows("train")
    positive = np.flatnonzero(rows["label"] == 1)
    given = {
        (user, time, end): set()
        for user, time, end in zip(rows["user"], rows["timestamp"], rows["history_end"], strict=True)
    }
    for place in positive:
        key = rows["user"][place], rows["timestamp"][place], rows["history_end"][place]
        given[key].add(rows["dense_hour"][place])
    negatives = np.flatnonzero(rows["label"] == 0)
    assert len(negatives) > len(positive)
    for place in negatives:
        key = rows["user"][place], rows["timestamp"][place], rows["history_end"][place]
        assert rows["dense_hour"][place] in given[key]


def test_shards_hold_them_and_a_stream_reads_them_alike(tmp_path: Path) -> None:
    data = prepare_dense(tmp_path / "data", make_dense())
    paths = split_into_shards(data, "test", 1, tmp_path / "shards")
    table = read_shard(paths[0], data.tasks, data.dense_columns)
    memory = RecentEvents(data, 3)
    memory.start(before=table["timestamp"][0].as_py())
    (from_shard,) = BatchStream(memory.open(table), "test", batch_size=1000, max_history=3)
    (from_folder,) = BatchStream(data, "test", batch_size=1000, max_history=3)
    assert from_shard.dense.tolist() == from_folder.dense.tolist()
    with pytest.raises(DataError, match="no column 'dense_price'"):
        read_shard(paths[0], data.tasks, ["dense_price"])


def test_a_folder_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    data = prepare_dense(tmp_path / "data", make_raw())
    assert data.meta["dense"] == []
    earlier = PreparedData(data.folder, {key: value for key, value in data.meta.items() if key != "dense"})
    assert earlier.dense_features == []
    (batch,) = BatchStream(earlier, "test", batch_size=1000, max_history=3)
    assert list(batch.dense.shape) == [len(batch.label), 0]


def test_a_value_that_never_changes_is_0_and_one_that_is_never_known_is_refused(tmp_path: Path) -> None:
    raw = make_raw()
    always = np.full(len(raw.rating), 7.0)
    data = prepare_dense(tmp_path / "data", replace(raw, dense={"always": always}))
    assert data.dense_features == [DenseFeature("always", 7.0, 1.0)]
    never = replace(raw, dense={"never": np.full(len(raw.rating), np.nan)})
    with pytest.raises(DataError, match="dense feature 'never' is unknown in all"):
        prepare_dense(tmp_path / "other", never)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"hour": [1.0, np.inf]}, r"row 1: dense\['hour'\] is inf, must be finite, or NaN if unknown"),
        ({"hour": [1, 2]}, r"dense\['hour'\] is int64 \[2\], expected floating point \[\d+\]"),
        ({"Hour": [1.0, 2.0]}, "dense feature 'Hour' needs another name"),
        ({"taste": [1.0, 2.0]}, "dense feature 'taste' needs another name"),
    ],
)
def test_what_is_refused(tmp_path: Path, dense: dict[str, list[float]], message: str) -> None:
    raw = make_raw()
    columns = {
        name: np.array((start * len(raw.rating))[: 2 if "int64" in message else len(raw.rating)])
        for name, start in dense.items()
    }
    with pytest.raises(DataError, match=message):
        prepare_dense(tmp_path / "data", replace(raw, dense=columns))
