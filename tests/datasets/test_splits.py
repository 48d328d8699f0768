"""Properties of the splits: nothing leaks over users, items or time, and shares are met."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.datasets.splits import TEST, TRAIN, VALIDATION, cold_items, leave_last, temporal
from torchrec_em3.errors import ConfigError, DataError

quick = settings(max_examples=30, deadline=None)
times = st.lists(st.integers(0, 40), min_size=3, max_size=200).filter(lambda values: len(set(values)) >= 3)


@quick
@given(times)
def test_temporal_cuts_between_instants_and_as_near_as_they_allow(values: list[int]) -> None:
    timestamps = np.array(values)
    split, (first, second) = temporal(timestamps)
    assert split.dtype == np.int8
    assert np.array_equal(split, (timestamps >= first).astype(int) + (timestamps >= second))
    assert set(split.tolist()) == {TRAIN, VALIDATION, TEST}
    instants = np.unique(timestamps)
    shares = [abs(np.sum(timestamps < cut) - 0.8 * len(values)) for cut in instants[1:-1]]
    assert abs(np.sum(split == TRAIN) - 0.8 * len(values)) == min(shares)


@quick
@given(times, st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.05, 0.05, 0.9), (0.9, 0.05, 0.05)]))
def test_temporal_takes_the_cuts_that_a_look_at_every_instant_takes(
    values: list[int], fractions: tuple[float, float, float]
) -> None:
    instants = sorted(set(values))
    before = [sum(value < instant for value in values) for instant in instants]
    wanted = len(values) * np.cumsum(fractions)[:2]
    first = min(range(1, len(instants) - 1), key=lambda place: abs(before[place] - wanted[0]))
    second = min(range(first + 1, len(instants)), key=lambda place: abs(before[place] - wanted[1]))
    assert temporal(np.array(values), fractions)[1] == (instants[first], instants[second])


def test_temporal_is_exact_where_all_instants_differ() -> None:
    split, cuts = temporal(np.random.default_rng(0).permutation(1000))
    assert np.bincount(split).tolist() == [800, 100, 100]
    assert cuts == (800, 900)
    split, _ = temporal(np.arange(100), (0.5, 0.25, 0.25))
    assert np.bincount(split).tolist() == [50, 25, 25]


def test_temporal_refuses_what_cannot_be_cut() -> None:
    with pytest.raises(DataError, match="100 events with 2 distinct timestamps"):
        temporal(np.repeat([5, 6], 50))
    with pytest.raises(DataError, match="9 events with 1 distinct timestamps"):
        temporal(np.full(9, 5))
    for fractions in ((0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)):
        with pytest.raises(ConfigError, match="must be positive and sum to 1"):
            temporal(np.arange(10), fractions)


@quick
@given(st.lists(st.integers(0, 9), max_size=80), st.integers(0, 9))
def test_leave_last_takes_each_users_last_two(users: list[int], seed: int) -> None:
    user = np.array(users, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(users))
    split = leave_last(user, order)
    for one in set(users):
        mine = sorted(np.flatnonzero(user == one).tolist(), key=lambda event: order[event])
        expected = [TRAIN] * len(mine)
        if len(mine) >= 3:
            expected[-2:] = [VALIDATION, TEST]
        assert split[mine].tolist() == expected


@quick
@given(st.integers(60, 300), st.integers(4, 40), st.integers(0, 1000), st.sampled_from([0.1, 0.3]))
def test_cold_items_lie_whole_in_one_split(num_events: int, num_items: int, seed: int, share: float) -> None:
    item = np.random.default_rng(seed).integers(0, num_items, num_events)
    split = cold_items(item, seed, share)
    assert split.dtype == np.int8
    by_item = {one: set(split[item == one].tolist()) for one in np.unique(item).tolist()}
    assert all(len(parts) == 1 for parts in by_item.values())
    cold = [one for one, parts in by_item.items() if parts != {TRAIN}]
    assert len(cold) == max(2, round(share * len(by_item)))
    assert np.array_equal(split, cold_items(item, seed, share))


def test_cold_items_halves_depend_on_the_seed_only() -> None:
    random = np.random.default_rng(0)
    item, order = random.integers(0, 200, 5000), random.permutation(5000)
    chosen = []
    for seed in range(3):
        split = cold_items(item, seed)
        assert np.array_equal(cold_items(item[order], seed), split[order])
        cold = [set(item[split == part].tolist()) for part in (VALIDATION, TEST)]
        assert [len(part) for part in cold] == [10, 10]
        assert not cold[0] & cold[1]
        chosen.append(frozenset(cold[0] | cold[1]))
    assert len(set(chosen)) == 3


def test_cold_items_refuses_what_leaves_nothing() -> None:
    with pytest.raises(DataError, match="2 items with events are too few"):
        cold_items(np.array([0, 1, 1]), 0)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        cold_items(np.arange(10), 0, share=1.0)
