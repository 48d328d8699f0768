"""What every reader of raw files hands to `prepare`: plain columns, one entry an event, a user or an item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torchrec_em3.datasets.ids import Ids

__all__ = ["RawCodes", "RawDataset", "RawItems"]


@dataclass(frozen=True)
class RawItems:
    """The catalogue as the publisher describes it, aligned columns.

    Attributes:
        item_id: Publisher's ids, str, distinct.
        title: Title or "".
        text: What the text encoder reads, or "" where there is nothing to read.
        image: Picture path relative to `RawDataset.image_root`, or "" where the catalogue names none.
        category: Human-readable category for reports (not a feature), or "".
    """

    item_id: np.ndarray
    title: np.ndarray
    text: np.ndarray
    image: np.ndarray
    category: np.ndarray


@dataclass(frozen=True)
class RawCodes:
    """Semantic codes of items by one quantiser.

    Attributes:
        source: Where they come from, for the records.
        of_item: One number a level, the first level first, by item id; not every item of the catalogue need have codes.
    """

    source: str
    of_item: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class RawDataset:
    """One data set before indexing, splitting and encoding.

    Attributes:
        name: Name of the data set for the records.
        user_id: Publisher's user id of each event: str, or a `pyarrow.DictionaryArray` of them, which takes 4 bytes an
            event.
        item_id: Publisher's item id of each event, likewise.
        rating: Rating of each event, float32; clicks are 0 and 1.
        timestamp: Seconds since 1970 of each event, int64; where `timed` is false, its place among its user's events.
        items: The catalogue; holds every `item_id` of the events, and possibly more.
        image_root: Folder that `items.image` is relative to.
        user_features: For each side feature, value (str, "" = unknown) by user id.
        probability: True probability of the main task's 1 in each event where it is known (simulated data), else None.
        codes: Semantic codes of the items by name of the quantiser.
        labels: 0 or 1 of each event by name of the task, the main task first, for tasks that are not thresholds of the
            rating, such as click and like; empty if labels come from the rating.
        dense: Numbers of each event by name, floating point, NaN where unknown: what holds of the moment, such as the
            hour or the days since the last visit, and not of the item.
        sparse: Categories of each event by name, likewise of the moment, such as the device, in the form of `user_id`;
            "" or null where unknown.
        timed: False if only the order of each user's events is known, so that nothing compares two users' events.
    """

    name: str
    user_id: Ids
    item_id: Ids
    rating: np.ndarray
    timestamp: np.ndarray
    items: RawItems
    image_root: Path
    user_features: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    probability: np.ndarray | None = None
    codes: Mapping[str, RawCodes] = field(default_factory=dict)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    dense: Mapping[str, np.ndarray] = field(default_factory=dict)
    sparse: Mapping[str, Ids] = field(default_factory=dict)
    timed: bool = True
