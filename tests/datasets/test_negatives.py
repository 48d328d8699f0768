"""Sampled negatives: never what the user took, as many as asked for, from a seed, as popular as the positives."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets.raw_data import make_raw
from torchrec_em3.batch import HISTORY
from torchrec_em3.datasets.indexing import index_dataset
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.negatives import NEGATIVE_SAMPLINGS, sample_negatives
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.splits import SPLITS, TEST, TRAIN, VALIDATION
from torchrec_em3.errors import ConfigError

Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
PARTS = (TRAIN, VALIDATION, TEST)


def draw_events(seed: int, num_events: int, num_users: int, num_items: int) -> Events:
    random = np.random.default_rng(seed)
    user, item = random.integers(0, num_users, num_events), random.zipf(1.5, num_events) % num_items
    label, split = random.integers(0, 2, num_events), random.choice(3, num_events, p=[0.6, 0.2, 0.2])
    return user, item, label, split


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_events=st.integers(1, 200),
    num_users=st.integers(1, 12),
    num_items=st.integers(1, 30),
    num=st.integers(1, 8),
    sampling=st.sampled_from(NEGATIVE_SAMPLINGS),
)
def test_each_positive_has_as_many_different_items_that_its_user_never_took_as_there_can_be(
    seed: int, num_events: int, num_users: int, num_items: int, num: int, sampling: str
) -> None:
    user, item, label, split = events = draw_events(seed, num_events, num_users, num_items)
    drawn = sample_negatives(*events, num=num, sampling=sampling, seed=seed)
    again = sample_negatives(*events, num=num, sampling=sampling, seed=seed)
    assert np.array_equal(drawn.positive, again.positive)
    assert np.array_equal(drawn.item, again.item)
    taken = {one: set(item[user == one].tolist()) for one in np.unique(user).tolist()}
    candidates = {part: set(item[(split == part) & (label == 1)].tolist()) for part in PARTS}
    assert len(set(zip(drawn.positive.tolist(), drawn.item.tolist(), strict=True))) == len(drawn.item)
    for positive, negative in zip(drawn.positive.tolist(), drawn.item.tolist(), strict=True):
        assert negative in candidates[int(split[positive])] - taken[int(user[positive])]
    counts = np.bincount(drawn.positive, minlength=num_events)
    for event in range(num_events):
        free = len(candidates[int(split[event])] - taken[int(user[event])])
        assert counts[event] == (min(num, free) if label[event] == 1 else 0)


def test_another_seed_draws_other_items() -> None:
    events = draw_events(0, 500, 50, 40)
    drawn = [sample_negatives(*events, num=3, sampling="uniform", seed=seed).item for seed in range(2)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("sampling", NEGATIVE_SAMPLINGS)
def test_how_often_an_item_is_drawn(sampling: str) -> None:
    """Every user took one item of 20, whose shares are known; one negative each, so nothing is drawn twice."""
    random = np.random.default_rng(0)
    share = np.arange(1, 21) / 210
    item = random.choice(20, 60_000, p=share)
    user, ones = np.arange(len(item)), np.ones(len(item), dtype=np.int8)
    drawn = sample_negatives(user, item, ones, np.zeros_like(ones), num=1, sampling=sampling, seed=1)
    weight = np.bincount(item, minlength=20) / len(item) if sampling == "popularity" else np.full(20, 1 / 20)
    # A user whose item is j draws i with chance weight[i] / (1 - weight[j]).
    taken = np.bincount(item, minlength=20) / len(item)
    expected = weight * ((taken / (1 - weight)).sum() - taken / (1 - weight))
    found = np.bincount(drawn.item, minlength=20) / len(drawn.item)
    assert expected.sum() == pytest.approx(1)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / len(item))
    assert np.corrcoef(found, weight)[0, 1] > 0.99 or sampling == "uniform"


def test_no_positives_no_negatives() -> None:
    empty = np.empty(0, dtype=np.int64)
    assert len(sample_negatives(empty, empty, empty, empty, num=2, sampling="uniform", seed=0).item) == 0
    with pytest.raises(ConfigError, match=r"negative_sampling is 'populrity'.*Did you mean 'popularity'"):
        sample_negatives(empty, empty, empty, empty, num=2, sampling="populrity", seed=0)


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), num=st.integers(1, 3))
def test_negatives_are_rows_beside_their_positives_and_in_no_history(split: str, seed: int, num: int) -> None:
    raw = make_raw(200, 12, 30, 150, seed)
    plain = index_dataset(raw, split=split, seed=seed, label_threshold=4.0)
    indexed = index_dataset(raw, split=split, seed=seed, label_threshold=4.0, negatives=num)
    for name in ("offsets", "items"):
        assert np.array_equal(getattr(indexed.histories, name), getattr(plain.histories, name))
    for rows in ("users", "items"):
        assert np.array_equal(getattr(indexed, rows).raw_id, getattr(plain, rows).raw_id)
        assert np.array_equal(getattr(indexed, rows).train_count, getattr(plain, rows).train_count)

    def rows_of(events: Mapping[str, np.ndarray]) -> list[tuple[float, ...]]:
        names = ("user", "item", "label", "rating", "timestamp", "history_end", "split")
        return list(zip(*(events[name].tolist() for name in names), strict=True))

    # What was there stays, in order; what came is a rating 0 and label 0 with a positive's user, time, history, split.
    added = Counter(rows_of(indexed.events)) - Counter(rows_of(plain.events))
    assert [row for row in rows_of(indexed.events) if row not in added] == rows_of(plain.events)
    places = {(row[0], *row[4:]) for row in rows_of(plain.events) if row[2] == 1}
    assert all(row[2:4] == (0, 0.0) and (row[0], *row[4:]) in places for row in added)
    taken = {(row[0], row[1]) for row in rows_of(plain.events)}
    assert not {(row[0], row[1]) for row in added} & taken
    keys = list(zip(indexed.events["timestamp"].tolist(), indexed.events["user"].tolist(), strict=True))
    assert keys == sorted(keys)
    cold = indexed.items.known
    assert max(row[1] for row in rows_of(indexed.events) if row[6] == TRAIN) <= cold


def test_a_prepared_folder_with_negatives_reads_back(tmp_path: Path) -> None:
    options = PrepareOptions(negatives=2, text_encoder="none", image_encoder="none")
    meta = prepare(make_raw(), tmp_path / "data", options)
    data = PreparedData.open(tmp_path / "data")
    data.verify()
    plain = prepare(make_raw(), tmp_path / "plain", replace(options, negatives=0))
    extra = meta["counts"]["interactions"] - plain["counts"]["interactions"]
    assert meta["negatives"] == {"per_positive": 2, "sampling": "popularity", "rows": extra}
    assert plain["negatives"]["rows"] == 0
    assert extra > 100
    assert len(data.history_items) == plain["counts"]["interactions"]
    taken = set(data.history_items.tolist())
    batches = BatchStream(data, "train", batch_size=16, max_history=50)
    assert {item for batch in batches for item in batch.sparse[HISTORY].values().tolist()} <= taken
    assert (
        sum(len(data.split_rows(split)["item"]) for split in ("train", "validation", "test"))
        == len(data.history_items) + extra
    )


def test_simulated_data_has_chances_that_negatives_lack() -> None:
    raw = make_raw()
    raw = replace(raw, probability=np.full(len(raw.rating), 0.5, dtype=np.float32))
    with pytest.raises(ConfigError, match="true click probabilities, which sampled negatives lack"):
        index_dataset(raw, split="temporal", seed=0, label_threshold=4.0, negatives=1)
    with pytest.raises(ConfigError, match="option negatives is -1, must be at least 0"):
        PrepareOptions(negatives=-1)
