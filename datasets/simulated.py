"""A simulated shop whose click probabilities are known: rendered pictures, written descriptions, users with tastes.

The logit of a click of user u on item i is

    bias + visual[u, i] + textual[u, i] + hidden[u, i]

* visual: u's liking of the colour, shape, pattern and size that the picture of i shows;
* textual: u's liking of the topic, material, style and use that the description of i tells;
* hidden: taste for a latent vector of i, and a quality of i, that neither picture nor description shows.

What is shown to whom (exposure) follows popularity, Zipf-like with a push for new items, and for `exposure_share` of
the events also the user's liking, so that a history says something about its user. Popularity is independent of
liking and of content. Labels are drawn from the click probability *given* that the item is shown: AUC measures liking
among shown items, not exposure. Items are released over time, so the end of the time line holds items that the
training part of a temporal split has never seen.

No model can beat, in expectation, the AUC of the true probability, which is below 1 because labels are drawn. With the
default options it is 0.84 to 0.85 for seeds 0 to 5 (test tenth: 0.84; its 15 to 22 % of events on items without a
training event: 0.84 to 0.87). The visual and textual parts alone, without the hidden one, reach 0.81.

A catalogue of any number of users takes the memory of its events: users are drawn a block at a time.

Shape letters: E events.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from torchrec_em3.datasets.ids import ids_from_codes
from torchrec_em3.datasets.raw import RawDataset, RawItems
from torchrec_em3.datasets.simulated_exposure import draw_events
from torchrec_em3.datasets.simulated_pictures import VISUAL_ATTRIBUTES, draw_picture
from torchrec_em3.datasets.simulated_texts import TEXT_ATTRIBUTES, write_description, write_title
from torchrec_em3.datasets.simulated_world import USER_FEATURES, SimulatedOptions, World, draw_world

__all__ = ["SimulatedOptions", "simulate"]

FIRST_SECOND = 1_704_067_200  # 2024-01-01
SECONDS = 180 * 24 * 3600

_CHUNK = 1 << 20  # events whose probabilities are in memory in double precision


def _draw_clicks(logit_E: np.ndarray, options: SimulatedOptions) -> tuple[np.ndarray, np.ndarray]:
    """Return click (0 or 1) and click probability of each event, float32; the mean probability is the click rate."""
    starts = range(0, len(logit_E), _CHUNK)

    def probability(start: int, bias: float) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-(logit_E[start : start + _CHUNK].astype(np.float64) + bias))))

    def mean(bias: float) -> float:
        value, seen = 0.0, 0
        for start in starts:
            part = probability(start, bias)
            seen += len(part)
            value += (float(part.mean()) - value) * (len(part) / seen)
        return value

    low, high = -30.0, 30.0
    for _ in tqdm(range(60), desc="draw clicks", disable=None):
        bias = (low + high) / 2
        if mean(bias) < options.click_rate:
            low = bias
        else:
            high = bias
    rng = np.random.default_rng([options.seed, 4])
    click_E, probability_E = np.empty_like(logit_E), np.empty_like(logit_E)
    for start in starts:
        part = probability(start, (low + high) / 2)
        click_E[start : start + _CHUNK] = rng.random(len(part)) < part
        probability_E[start : start + _CHUNK] = part
    return click_E, probability_E


def _write_items(world: World, options: SimulatedOptions, folder: Path) -> RawItems:
    """Render and write the catalogue; an item's content depends on the seed and its number only."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    attributes = VISUAL_ATTRIBUTES | TEXT_ATTRIBUTES
    titles, texts, images = [], [], []
    for item in tqdm(range(options.num_items), desc="draw items", unit="item", disable=None):
        rng = np.random.default_rng([options.seed, 3, item])
        value = {name: attributes[name][int(world.values[name][item])] for name in attributes}
        no_image, no_text = rng.random(2) < (options.missing_image, options.missing_text)
        picture = draw_picture(value, options.image_size, rng)
        description = write_description(value, rng)
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
    events = draw_events(world, options)
    click_E, probability_E = _draw_clicks(events.logit_E, options)
    items = _write_items(world, options, Path(folder))
    user_ids = np.array([f"user-{user:05d}" for user in range(options.num_users)])
    features = {
        name: {str(user): labels[group] for user, group in zip(user_ids, world.groups[name], strict=True)}
        for name, (_, labels, _) in USER_FEATURES.items()
    }
    return RawDataset(
        name="simulated",
        user_id=ids_from_codes(events.user_E, user_ids),
        item_id=ids_from_codes(events.item_E, items.item_id),
        rating=click_E,
        timestamp=FIRST_SECOND + (events.time_E * SECONDS).astype(np.int64),
        items=items,
        image_root=Path(folder),
        user_features=features,
        probability=probability_E,
    )
