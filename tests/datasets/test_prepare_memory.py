"""Preparing a few events at a time: the same numbers as all at once, and a bound on the bytes that an event takes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets.raw_data import make_raw, with_dictionaries
from torchrec_em3.datasets import ids, ordered_events, user_groups
from torchrec_em3.datasets.indexing import IndexedDataset, index_dataset
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawDataset, RawItems
from torchrec_em3.datasets.splits import SPLITS

NO_ENCODERS = {"text_encoder": "none", "image_encoder": "none"}
MOST_BYTES = 48
"""For each event beyond those of the raw data. What is held to the end: rows of user and item, label, split, order,
end of the history, item of the history (26); the others are temporary."""


def small_steps(patch: pytest.MonkeyPatch, size: int) -> None:
    patch.setattr(ids, "_CHUNK", size)
    patch.setattr(user_groups, "_GROUP_EVENTS", size)


def check_equal(one: IndexedDataset, other: IndexedDataset) -> None:
    assert one.events.keys() == other.events.keys()
    for name in one.events:
        assert one.events[name].dtype == other.events[name].dtype
        assert np.array_equal(one.events[name], other.events[name])
    for name in ("offsets", "items", "end"):
        assert np.array_equal(getattr(one.histories, name), getattr(other.histories, name))
    for rows in ("users", "items"):
        assert np.array_equal(getattr(one, rows).raw_id, getattr(other, rows).raw_id)
        assert np.array_equal(getattr(one, rows).train_count, getattr(other, rows).train_count)
    assert np.array_equal(one.catalogue, other.catalogue)
    assert one.time_cuts == other.time_cuts


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 60), negatives=st.integers(0, 2))
def test_small_steps_give_the_same_numbers(split: str, seed: int, size: int, negatives: int) -> None:
    raw = make_raw(200, 12, 30, 150, seed)

    def index(data: RawDataset) -> IndexedDataset:
        return index_dataset(data, split=split, seed=seed, label_threshold=4.0, negatives=negatives)

    whole = index(raw)
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch, size)
        check_equal(index(raw), whole)
        check_equal(index(with_dictionaries(raw)), whole)


def test_row_groups_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PrepareOptions(max_part_rows=150, **NO_ENCODERS)
    prepare(make_raw(), tmp_path / "whole", options)
    monkeypatch.setattr(ordered_events, "ROW_GROUP_ROWS", 40)
    prepare(make_raw(), tmp_path / "groups", options)
    whole, groups = PreparedData.open(tmp_path / "whole"), PreparedData.open(tmp_path / "groups")
    for split in ("train", "validation", "test"):
        one, other = whole.split_rows(split), groups.split_rows(split)
        assert all(np.array_equal(one[name], other[name]) for name in one)


def make_events(count: int) -> RawDataset:
    """Distinct events in time order, ids in dictionaries."""
    random = np.random.default_rng(0)
    users, items = (np.array([f"{kind}{number:03d}" for number in range(200)]) for kind in "ui")
    empty = np.full(200, "")
    return RawDataset(
        name="many",
        user_id=ids.ids_from_codes(random.integers(0, 200, count, dtype=np.int32), users),
        item_id=ids.ids_from_codes(random.integers(0, 200, count, dtype=np.int32), items),
        rating=random.integers(0, 2, count).astype(np.float32),
        timestamp=np.arange(count, dtype=np.int64),
        items=RawItems(items, items, empty, empty, empty),
        image_root=Path(),
    )


def peak_bytes(raw: RawDataset, out: Path) -> int:
    tracemalloc.start()
    prepare(raw, out, PrepareOptions(label_threshold=None, **NO_ENCODERS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_an_event_takes_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch, 1 << 12)
    monkeypatch.setattr(ordered_events, "ROW_GROUP_ROWS", 1 << 12)
    few, many = 50_000, 150_000
    added = peak_bytes(make_events(many), tmp_path / "many") - peak_bytes(make_events(few), tmp_path / "few")
    assert added < MOST_BYTES * (many - few), f"{added / (many - few):.1f} bytes an event"
