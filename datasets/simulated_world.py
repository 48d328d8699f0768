"""The world behind the simulated catalogue: what items are like, what users like, and so the logit of every click.

No array holds all pairs of users and items: a logit is a product of a few numbers of each, made for a block of users
when it is asked for.

Shape letters: U users, B users of a block, I items, K dimensions of taste, V values of an attribute.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torchrec_em3.datasets.simulated_pictures import VISUAL_ATTRIBUTES
from torchrec_em3.datasets.simulated_texts import TEXT_ATTRIBUTES
from torchrec_em3.errors import ConfigError

__all__ = ["USER_FEATURES", "SimulatedOptions", "World", "draw_world"]

# Pairs of users and items that are in memory at a time. Events are drawn block by block, so another number would draw
# others in a catalogue that has more pairs than one block.
_BLOCK_PAIRS = 1 << 23

Part = Callable[[slice], np.ndarray]
"""How much the users of a slice like each item for something, float64 [B, I]."""

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
# Side features say a little about a taste: which part, which groups, and the share of the taste's variance.
USER_FEATURES = {
    "age_group": ("textual", ("under 25", "25-39", "40-59", "60 and over"), 0.15),
    "region": ("visual", ("north", "east", "south", "west", "islands"), 0.15),
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
        for name in ("seed", "logit_std", "zipf"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"option {name} is {getattr(self, name)}, must be 0 or more")
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
        parts: What makes a logit, each with its weight.
        logit_std: Standard deviation of the logit over all pairs.
        blocks: The users, a block at a time.
        popularity_I: Exposure weight of each item, without the push for new ones.
        release_I: When an item appears, 0 to 1 of the time line.
    """

    values: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]
    parts: Sequence[tuple[float, Part]]
    logit_std: float
    blocks: Sequence[slice]
    popularity_I: np.ndarray
    release_I: np.ndarray

    def logits(self, users: slice) -> np.ndarray:
        """Return the click logit, without the bias, of some users and all items, float32 [B, I]."""
        logit_BI = sum(weight * part(users) for weight, part in self.parts) * self.logit_std
        return np.asarray(logit_BI, dtype=np.float32)


def _standardise(part: Part, blocks: Sequence[slice]) -> Part:
    """Return the part with mean 0 and standard deviation 1 over all pairs."""
    seen, mean, variance = 0, 0.0, 0.0
    for users in blocks:
        value_BI = part(users)
        share = value_BI.size / (seen + value_BI.size)
        shift = value_BI.mean() - mean
        variance += (value_BI.var() - variance) * share + shift**2 * share * (1 - share)
        mean += shift * share
        seen += value_BI.size
    deviation = max(float(np.sqrt(variance)), 1e-12)
    return lambda users: (part(users) - mean) / deviation


def _draw_liking(
    part: str,
    attributes: Mapping[str, tuple[str, ...]],
    values: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    users: int,
    rng: np.random.Generator,
) -> Part:
    """Return how much each user likes each item for its attributes, not scaled.

    A user is a point in a few dimensions of taste, and so is each value of an attribute; a value is liked as far as the
    two point the same way. Side features move the user's point a little.
    """
    point_UK = rng.standard_normal((users, TASTE_DIM))
    for feature, (informed, labels, share) in USER_FEATURES.items():
        if informed == part:
            shift = rng.standard_normal((len(labels), TASTE_DIM))[groups[feature]]
            point_UK = np.sqrt(1 - share) * point_UK + np.sqrt(share) * shift
    # All users care equally much: else who clicks a lot would be most of what there is to learn about a new item.
    point_UK *= np.sqrt(TASTE_DIM) / np.linalg.norm(point_UK, axis=1, keepdims=True)
    liked = []
    for name, choices in attributes.items():
        value_VK = rng.standard_normal((len(choices), TASTE_DIM))
        value_VK -= value_VK.mean(0)
        value_VK *= np.sqrt(WEIGHTS[name] / (value_VK**2).sum(1).mean())
        liked.append((value_VK, values[name]))

    def liking(users: slice) -> np.ndarray:
        point_BK = point_UK[users]
        liking_BI = np.zeros((len(point_BK), len(liked[0][1])))
        for value_VK, value_I in liked:
            liking_BI += (point_BK @ value_VK.T)[:, value_I]
        return liking_BI

    return liking


def draw_world(options: SimulatedOptions) -> World:
    """Draw catalogue, users and what makes click logits; the same options give the same world."""
    rng = np.random.default_rng([options.seed, 1])
    users, items = options.num_users, options.num_items
    attributes = VISUAL_ATTRIBUTES | TEXT_ATTRIBUTES
    values = {name: rng.integers(len(choices), size=items) for name, choices in attributes.items()}
    groups = {name: rng.integers(len(labels), size=users) for name, (_, labels, _) in USER_FEATURES.items()}
    parts = {
        "visual": _draw_liking("visual", VISUAL_ATTRIBUTES, values, groups, users, rng),
        "textual": _draw_liking("textual", TEXT_ATTRIBUTES, values, groups, users, rng),
    }
    taste_UK, taste_KI = rng.standard_normal((users, LATENT_DIM)), rng.standard_normal((LATENT_DIM, items))
    quality_I = rng.standard_normal(items)
    size = max(1, _BLOCK_PAIRS // items)
    blocks = [slice(start, min(start + size, users)) for start in range(0, users, size)]
    taste = _standardise(lambda users: taste_UK[users] @ taste_KI, blocks)
    parts["hidden"] = lambda users: np.sqrt(0.6) * taste(users) + np.sqrt(0.4) * quality_I
    shares = {
        "visual": options.visual,
        "textual": options.textual,
        "hidden": max(0.0, 1 - options.visual - options.textual),
    }
    weighted = [(float(np.sqrt(share)), _standardise(parts[name], blocks)) for name, share in shares.items()]
    popularity_I = (1.0 + rng.permutation(items)) ** -options.zipf
    late = rng.random(items) >= options.first_release
    release_I = np.where(late, rng.random(items), 0.0)
    return World(values, groups, weighted, options.logit_std, blocks, popularity_I, release_I)
