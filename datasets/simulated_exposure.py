"""Who of the simulated users is shown which item, and when.

Shape letters: I items, E events, B users of a block, A of them active in a period.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from torchrec_em3.datasets.simulated_world import SimulatedOptions, World

__all__ = ["Events", "draw_events"]

PERIODS = 40


@dataclass(frozen=True)
class Events:
    """Events in time order, aligned.

    Attributes:
        user_E: User, int32.
        item_E: Item, int32.
        time_E: 0 to 1, float64.
        logit_E: Click logit without the bias, float32.
    """

    user_E: np.ndarray
    item_E: np.ndarray
    time_E: np.ndarray
    logit_E: np.ndarray


def _draw_visits(users: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return user and time (0 to 1) of each event; some users join late, some come often."""
    activity = rng.lognormal(sigma=0.5, size=users)
    joined = np.where(rng.random(users) < 0.6, 0.0, rng.uniform(0.0, 0.95, size=users))
    activity *= 1.0 - joined
    user_E = rng.choice(users, size=count, p=activity / activity.sum())
    time_E = joined[user_E] + (1 - joined[user_E]) * rng.random(count)
    return user_E, time_E


def draw_events(world: World, options: SimulatedOptions) -> Events:
    """Decide who is shown what and when; nobody is shown the same item twice."""
    rng = np.random.default_rng([options.seed, 2])
    total = options.num_interactions
    # A user who has seen everything is shown nothing, so that there may be fewer.
    columns = [np.empty(total, dtype=dtype) for dtype in (np.int32, np.int32, np.float64, np.float32)]
    drawn = 0
    with tqdm(total=total, desc="draw events", unit="event", unit_scale=True, disable=None) as bar:
        for users in world.blocks:
            # So many that the events of all blocks add up.
            before, after = (total * user // options.num_users for user in (users.start, users.stop))
            block = _draw_block(world, options, users, after - before, rng)
            for column, part in zip(columns, block, strict=True):
                column[drawn : drawn + len(part)] = part
            drawn += len(block[0])
            bar.update(after - before)
    user_E, item_E, time_E, logit_E = (column[:drawn] for column in columns)
    order = np.argsort(time_E, kind="stable")
    return Events(user_E[order], item_E[order], time_E[order], logit_E[order])


def _draw_block(
    world: World, options: SimulatedOptions, users: slice, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return user, item, time and logit of about `count` events of a block of users, in no order."""
    user_E, time_E = _draw_visits(users.stop - users.start, count, rng)
    logit_BI = world.logits(users)
    item_E = _draw_exposure(world, options, logit_BI, user_E, time_E, rng)
    shown = np.flatnonzero(item_E >= 0)
    user_E, item_E = user_E[shown], item_E[shown]
    return user_E + users.start, item_E, time_E[shown], logit_BI[user_E, item_E]


def _draw_exposure(
    world: World,
    options: SimulatedOptions,
    logit_BI: np.ndarray,
    user_E: np.ndarray,
    time_E: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the item that each event of a block of users shows, -1 where the user has seen all."""
    guided_E = rng.random(len(user_E)) < options.exposure_share
    item_E = np.full(len(user_E), -1)
    seen_BI = np.zeros(logit_BI.shape, dtype=bool)
    period_E = (time_E * PERIODS).astype(np.int64)
    for period in range(PERIODS):
        start = period / PERIODS
        age_I = start - world.release_I
        # A new item gets up to four times the exposure, fading over a tenth of the time line.
        weight_I = world.popularity_I * (1.0 + 3.0 * np.exp(-np.maximum(age_I, 0.0) / 0.1) * (world.release_I > 0))
        weight_I = np.where(age_I >= 0, weight_I, 0.0).astype(np.float32)
        with np.errstate(divide="ignore"):
            log_weight_I = np.log(weight_I)
        for strength, guided in ((options.exposure_strength, True), (0.0, False)):
            events = np.flatnonzero((period_E == period) & (guided_E == guided))
            users, slot = np.unique(user_E[events], return_inverse=True)
            key_AI = log_weight_I + np.float32(strength) * logit_BI[users]
            key_AI[seen_BI[users]] = -np.inf
            item_E[events] = _draw_items(key_AI, slot, rng)
            shown = events[item_E[events] >= 0]
            seen_BI[user_E[shown], item_E[shown]] = True
    return item_E


def _draw_items(key_AI: np.ndarray, slot_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw distinct items for the events of each user, with probability proportional to exp(key) (Gumbel top-k).

    Args:
        key_AI: Log weight of each item for each active user; -inf: never.
        slot_E: Row of `key_AI` that each event belongs to.
        rng: Source of chance.

    Returns:
        Item of each event, -1 where nothing was left.
    """
    if not len(slot_E):
        return slot_E
    count_A = np.bincount(slot_E, minlength=len(key_AI))
    most = min(int(count_A.max()), key_AI.shape[1])
    noisy_AI = key_AI - np.log(rng.standard_exponential(key_AI.shape, dtype=np.float32) + np.float32(1e-30))
    top = np.argpartition(-noisy_AI, most - 1, axis=1)[:, :most]
    top_key = np.take_along_axis(noisy_AI, top, 1)
    rank = np.argsort(-top_key, axis=1)
    chosen = np.where(np.isfinite(np.take_along_axis(top_key, rank, 1)), np.take_along_axis(top, rank, 1), -1)
    order = np.argsort(slot_E, kind="stable")
    position = np.arange(len(slot_E)) - (np.cumsum(count_A) - count_A)[slot_E[order]]
    items = np.full(len(slot_E), -1)
    inside = position < most
    items[order[inside]] = chosen[slot_E[order[inside]], position[inside]]
    return items
