"""A simulated shop whose click probabilities are known: rendered pictures, written descriptions, users with tastes.

The logit of a click of user u on item i is

    bias + visual[u, i] + textual[u, i] + hidden[u, i]

* visual: u's liking of the colour, shape, pattern and size that the picture of i shows;
* textual: u's liking of the topic, material, style and use that the description of i tells;
* hidden: taste for a latent vector of i, and a quality of i, that neither picture nor description shows: only clicks teach it.

What is shown to whom (exposure) is popularity, Zipf-like with a push for new items, and for `exposure_share` of the events also
the user's liking, so that a history says something about its user. Labels are drawn from the click probability *given* that the
item is shown, so AUC measures liking among shown items, not exposure. Items are released over time: the end of the time line
holds items that the training part of a temporal split has never seen. Popularity is independent of liking and of content.

The AUC of the true probability itself is the most that any model can reach in expectation; it is below 1 because labels are drawn.
With the default options it is about PLACEHOLDER.

Shape letters: U users, I items, E events, A users active in a period.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from torchrec_em3.datasets.raw import RawDataset, RawItems
from torchrec_em3.datasets.simulated_pictures import VISUAL_ATTRIBUTES, draw_picture
from torchrec_em3.datasets.simulated_texts import TEXT_ATTRIBUTES, write_description, write_title
from torchrec_em3.errors import ConfigError

__all__ = ["SimulatedOptions", "World", "draw_world", "simulate"]

FIRST_SECOND = 1_704_067_200  # 2024-01-01
SECONDS = 180 * 24 * 3600
PERIODS = 40
LATENT_DIM = 4
TASTE_DIM = 2
# How much of the visual and of the textual part each attribute makes up (variance).
WEIGHTS = {
    "colour": 0.40,
    "shape": 0.35,
    "pattern": 0.15,
    "size": 0.10,
    "topic": 0.45,
    "material": 0.25,
    "style": 0.20,
    "use": 0.10,
}
# Side features shift a liking a little: which attribute, which groups, and the share of the liking's variance.
USER_FEATURES = {
    "age_group": ("topic", ("under 25", "25-39", "40-59", "60 and over"), 0.15),
    "region": ("colour", ("north", "east", "south", "west", "islands"), 0.15),
}


@dataclass(frozen=True, kw_only=True)
class SimulatedOptions:
    """Options of the simulated data set."""

    num_items: int = 1200
    """Items in the catalogue."""

    num_users: int = 1000
    """Users."""

    num_interactions: int = 90_000
    """Events, about: a user who has seen everything is shown nothing."""

    seed: int = 0
    """Everything is drawn from it, pictures included."""

    image_size: int = 128
    """Side of a picture in pixels."""

    visual: float = 0.45
    """Share of the logit's variance, over all pairs, that the pictures explain."""

    textual: float = 0.35
    """Share that the descriptions explain; the rest is hidden taste and quality."""

    logit_std: float = 1.5
    """Standard deviation of the logit over all pairs: larger makes the attainable AUC larger."""

    exposure_share: float = 0.5
    """Share of events in which liking, and not popularity alone, chose the item."""

    exposure_strength: float = 1.2
    """How strongly: weight of the logit in the exposure."""

    zipf: float = 0.7
    """Exponent of the popularity: the item of popularity rank k has weight k ** -zipf."""

    first_release: float = 0.5
    """Share of the catalogue that is there at the start; the others are released one by one."""

    click_rate: float = 0.45
    """Mean click probability of the events."""

    missing_image: float = 0.02
    """Share of items without a picture."""

    missing_text: float = 0.02
    """Share of items without a description."""

    def __post_init__(self) -> None:
        """Check sizes and shares."""
        for name, least in (("num_items", 20), ("num_users", 10), ("num_interactions", 100), ("image_size", 16)):
            if getattr(self, name) < least:
                raise ConfigError(f"option {name} is {getattr(self, name)}, must be at least {least}")
        for name in ("visual", "textual", "exposure_share", "first_release", "missing_image", "missing_text"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"option {name} is {getattr(self, name)}, must be from 0 to 1")
        if self.visual + self.textual > 1.0:
            raise ConfigError(
                f"options visual + textual are {self.visual + self.textual}, must be at most 1; lower one"
            )
        if not 0.0 < self.click_rate < 1.0:
            raise ConfigError(f"option click_rate is {self.click_rate}, must be between 0 and 1")


@dataclass(frozen=True)
class World:
    """The truth behind the events.

    Attributes:
        values: For each visual and textual attribute, the value of each item [I], a position in its list of values.
        groups: For each user side feature, the group of each user [U].
        logit_UI: Click logit without the bias, float32.
        popularity_I: Exposure weight of each item, without the push for new ones.
        release_I: When an item appears, 0 to 1 of the time line.
    """

    values: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]
    logit_UI: np.ndarray
    popularity_I: np.ndarray
    release_I: np.ndarray


def _standardise(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-12)


def _draw_liking(
    attributes: Mapping[str, tuple[str, ...]],
    values: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    users: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return how much each user likes each item for its attributes [U, I], not scaled.

    A user is a point in a few dimensions of taste, and so is each value of an attribute; a value is liked as far as the two
    point the same way. Side features move the user's point a little.
    """
    point_UK = rng.standard_normal((users, TASTE_DIM))
    for feature, (attribute, labels, share) in USER_FEATURES.items():
        if attribute in attributes:
            shift = rng.standard_normal((len(labels), TASTE_DIM))[groups[feature]]
            point_UK = np.sqrt(1 - share) * point_UK + np.sqrt(share) * shift
    # All users care equally much: else who clicks a lot would be most of what there is to learn about a new item.
    point_UK *= np.sqrt(TASTE_DIM) / np.linalg.norm(point_UK, axis=1, keepdims=True)
    liking_UI = np.zeros((users, len(next(iter(values.values())))))
    for name, choices in attributes.items():
        value_VK = rng.standard_normal((len(choices), TASTE_DIM))
        value_VK -= value_VK.mean(0)
        value_VK *= np.sqrt(WEIGHTS[name] / (value_VK**2).sum(1).mean())
        liking_UI += (point_UK @ value_VK.T)[:, values[name]]
    return liking_UI


def draw_world(options: SimulatedOptions) -> World:
    """Draw catalogue, users and all click logits; the same options give the same world."""
    rng = np.random.default_rng([options.seed, 1])
    users, items = options.num_users, options.num_items
    attributes = VISUAL_ATTRIBUTES | TEXT_ATTRIBUTES
    values = {name: rng.integers(len(choices), size=items) for name, choices in attributes.items()}
    groups = {name: rng.integers(len(labels), size=users) for name, (_, labels, _) in USER_FEATURES.items()}
    parts = {
        "visual": _draw_liking(VISUAL_ATTRIBUTES, values, groups, users, rng),
        "textual": _draw_liking(TEXT_ATTRIBUTES, values, groups, users, rng),
    }
    taste = rng.standard_normal((users, LATENT_DIM)) @ rng.standard_normal((LATENT_DIM, items))
    hidden = np.sqrt(0.6) * _standardise(taste) + np.sqrt(0.4) * rng.standard_normal(items)
    shares = {"visual": options.visual, "textual": options.textual, "hidden": 1 - options.visual - options.textual}
    parts["hidden"] = hidden
    logit_UI = sum(np.sqrt(share) * _standardise(parts[name]) for name, share in shares.items()) * options.logit_std
    popularity_I = (1.0 + rng.permutation(items)) ** -options.zipf
    late = rng.random(items) >= options.first_release
    release_I = np.where(late, rng.random(items), 0.0)
    return World(values, groups, logit_UI.astype(np.float32), popularity_I, release_I)


@dataclass(frozen=True)
class _Events:
    """Events in time order, aligned."""

    user_E: np.ndarray
    item_E: np.ndarray
    time_E: np.ndarray


def _draw_visits(options: SimulatedOptions, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return user and time (0 to 1) of each event; some users join late, some come often."""
    users = options.num_users
    activity = rng.lognormal(sigma=0.5, size=users)
    joined = np.where(rng.random(users) < 0.6, 0.0, rng.uniform(0.0, 0.95, size=users))
    activity *= 1.0 - joined
    user_E = rng.choice(users, size=options.num_interactions, p=activity / activity.sum())
    time_E = joined[user_E] + (1 - joined[user_E]) * rng.random(options.num_interactions)
    return user_E, time_E


def _draw_events(world: World, options: SimulatedOptions) -> _Events:
    """Decide who is shown what and when; nobody is shown the same item twice."""
    rng = np.random.default_rng([options.seed, 2])
    user_E, time_E = _draw_visits(options, rng)
    guided_E = rng.random(len(user_E)) < options.exposure_share
    item_E = np.full(len(user_E), -1)
    seen_UI = np.zeros(world.logit_UI.shape, dtype=bool)
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
            key_AI = log_weight_I + np.float32(strength) * world.logit_UI[users]
            key_AI[seen_UI[users]] = -np.inf
            item_E[events] = _draw_items(key_AI, slot, rng)
            shown = events[item_E[events] >= 0]
            seen_UI[user_E[shown], item_E[shown]] = True
    order = np.flatnonzero(item_E >= 0)
    order = order[np.argsort(time_E[order], kind="stable")]
    return _Events(user_E[order], item_E[order], time_E[order])


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


def _click_probability(logit_E: np.ndarray, click_rate: float) -> np.ndarray:
    """Return sigmoid(logit + bias) with the bias that makes the mean `click_rate`."""
    low, high = -30.0, 30.0
    for _ in range(60):
        bias = (low + high) / 2
        if (1 / (1 + np.exp(-(logit_E + bias)))).mean() < click_rate:
            low = bias
        else:
            high = bias
    return 1 / (1 + np.exp(-(logit_E + (low + high) / 2)))


def _write_items(world: World, options: SimulatedOptions, folder: Path) -> RawItems:
    """Render and write the catalogue; an item's content depends on the seed and its number only."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    attributes = VISUAL_ATTRIBUTES | TEXT_ATTRIBUTES
    titles, texts, images = [], [], []
    for item in tqdm(range(options.num_items), desc="draw items", unit="item", disable=None):
        rng = np.random.default_rng([options.seed, 3, item])
        value = {name: attributes[name][int(world.values[name][item])] for name in attributes}
        no_image, no_text = rng.random(2) < (options.missing_image, options.missing_text)
        picture = draw_picture(
            *(value[name] for name in ("colour", "shape", "pattern", "size")), options.image_size, rng
        )
        description = write_description(*(value[name] for name in ("topic", "material", "style", "use")), rng)
        name = f"images/{item:05d}.jpg"
        if not no_image:
            picture.save(folder / name, quality=90)
        titles.append(write_title(item, rng))
        texts.append("" if no_text else description)
        images.append("" if no_image else name)
    topics = np.array(TEXT_ATTRIBUTES["topic"])[world.values["topic"]]
    return RawItems(_item_ids(options.num_items), np.array(titles), np.array(texts), np.array(images), topics)


def _item_ids(count: int) -> np.ndarray:
    return np.array([f"item-{item:05d}" for item in range(count)])


def simulate(options: SimulatedOptions, folder: Path) -> RawDataset:
    """Write the pictures of a simulated catalogue and return its events.

    Args:
        options: Sizes, seed, and how much of a click each part explains.
        folder: Pictures go to `images/` below it; made if need be.

    Returns:
        Events in time order with ratings 0 and 1 (no click, click) and their true probability.
    """
    world = draw_world(options)
    events = _draw_events(world, options)
    probability_E = _click_probability(
        world.logit_UI[events.user_E, events.item_E].astype(np.float64), options.click_rate
    )
    rng = np.random.default_rng([options.seed, 4])
    click_E = rng.random(len(probability_E)) < probability_E
    items = _write_items(world, options, Path(folder))
    user_ids = np.array([f"user-{user:05d}" for user in range(options.num_users)])
    features = {
        name: {str(user): labels[group] for user, group in zip(user_ids, world.groups[name], strict=True)}
        for name, (_, labels, _) in USER_FEATURES.items()
    }
    return RawDataset(
        name="simulated",
        user_id=user_ids[events.user_E],
        item_id=items.item_id[events.item_E],
        rating=click_E.astype(np.float32),
        timestamp=FIRST_SECOND + (events.time_E * SECONDS).astype(np.int64),
        items=items,
        image_root=Path(folder),
        user_features=features,
        probability=probability_E.astype(np.float32),
    )
