"""Which events train, which validate, which test: pure functions of arrays, one entry an event (N of them).

Each returns an int8 array of TRAIN, VALIDATION and TEST, aligned with its input, whatever the order of the events.
"""

import math

import numpy as np

from torchrec_em3.errors import ConfigError, DataError

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION", "cold_items", "leave_last", "temporal"]

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = ("temporal", "leave_last", "cold_items")


def temporal(
    timestamps: np.ndarray, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut global time in two places: the past trains, the time after it validates, the latest tests.

    Args:
        timestamps: Integers [N].
        fractions: Wanted shares of the events. Since events of one instant stay together, the shares are met as nearly
            as instants allow, and each part gets at least one instant.

    Returns:
        The split of each event, and the first timestamp of validation and of test.

    Raises:
        ConfigError: If the fractions are not positive or do not sum to 1.
        DataError: If there are fewer than three distinct timestamps.
    """
    if min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
        raise ConfigError(f"split fractions {fractions} must be positive and sum to 1")
    ordered = np.sort(timestamps)
    # Where each instant begins but the first, which always trains.
    begins = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if len(begins) < 2:
        instants = min(len(ordered), 1) + len(begins)
        raise DataError(f"{len(timestamps)} events with {instants} distinct timestamps cannot be cut into three spans")
    wanted = len(ordered) * np.cumsum(fractions)[:2]
    first = _nearest(begins[:-1], float(wanted[0]))
    second = first + 1 + _nearest(begins[first + 1 :], float(wanted[1]))
    cuts = (int(ordered[begins[first]]), int(ordered[begins[second]]))
    return (timestamps >= cuts[0]).astype(np.int8) + (timestamps >= cuts[1]), cuts


def _nearest(ascending: np.ndarray, wanted: float) -> int:
    """Return the position of the number that is nearest to the wanted one, the first of two."""
    place = int(np.searchsorted(ascending, wanted))
    around = [one for one in (place - 1, place) if 0 <= one < len(ascending)]
    return min(around, key=lambda one: float(abs(ascending[one] - wanted)))


def leave_last(user: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Test on each user's last event, validate on the one before, train on the rest.

    Args:
        user: User of each event, integers [N].
        order: What sorts a user's events in time, distinct within a user, integers [N].

    Returns:
        The split of each event. Users with fewer than three events only train.
    """
    split = np.zeros(len(user), dtype=np.int8)
    if len(user) == 0:
        return split
    by_user = np.lexsort((order, user))
    last = np.flatnonzero(np.append(np.diff(user[by_user]) != 0, True))
    last = last[np.diff(last, prepend=-1) >= 3]
    split[by_user[last]] = TEST
    split[by_user[last - 1]] = VALIDATION
    return split


def cold_items(item: np.ndarray, seed: int, share: float = 0.1) -> np.ndarray:
    """Choose a seeded share of the items that never train, each with all its events, whenever these happened.

    Half of the cold items (the smaller half where their number is odd) belong to validation and half to test.

    Args:
        item: Item of each event, integers [N]. Numbers must mean the same items wherever the same split is wanted.
        seed: Seed of the choice of items.
        share: Share of the distinct items that is cold, between 0 and 1; at least two items are.

    Returns:
        VALIDATION and TEST for the events of cold items, TRAIN for those of all others, which are still to be split.

    Raises:
        ConfigError: If the share is not between 0 and 1.
        DataError: If no item would be left to train on.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share of cold items is {share}, must be between 0 and 1")
    items = np.unique(item)
    num_cold = max(2, round(share * len(items)))
    if num_cold >= len(items):
        raise DataError(f"{len(items)} items with events are too few to keep {num_cold} of them out of training")
    cold = np.random.default_rng(seed).choice(items, num_cold, replace=False)
    split = np.full(len(item), TRAIN, dtype=np.int8)
    split[np.isin(item, cold[: num_cold // 2])] = VALIDATION
    split[np.isin(item, cold[num_cold // 2 :])] = TEST
    return split
