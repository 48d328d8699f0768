"""Raw data for the tests of datasets/: a random but seeded RawDataset of any size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchrec_em3.datasets.raw import RawDataset, RawItems


def make_raw(
    num_events: int = 400,
    num_users: int = 20,
    num_items: int = 30,
    instants: int = 200,
    seed: int = 0,
    image_root: Path = Path(),
) -> RawDataset:
    """Events of equal times, items without events, three users who come last, ids that do not sort as numbers."""
    random = np.random.default_rng(seed)
    user = random.zipf(1.3, num_events) % num_users
    item = random.zipf(1.2, num_events) % (num_items - 2)
    timestamp = random.integers(0, instants, num_events)
    timestamp[user >= num_users - 3] = instants - 1
    _, kept = np.unique(np.stack([user, item, timestamp]), axis=1, return_index=True)
    kept = random.permutation(kept)
    item_id = np.array([f"i{number}" for number in random.permutation(num_items)], dtype=object)
    return RawDataset(
        name="random",
        user_id=np.array([f"u{number}" for number in user[kept]]),
        item_id=np.array([f"i{number}" for number in item[kept]]),
        rating=random.integers(1, 6, len(kept)).astype(np.float32),
        timestamp=timestamp[kept].astype(np.int64),
        items=RawItems(
            item_id=item_id,
            title=np.array([f"Title {name}" for name in item_id], dtype=object),
            text=np.array([f"Text of {name}" for name in item_id], dtype=object),
            image=np.full(num_items, "", dtype=object),
            category=np.array(["a", "b"] * (num_items // 2), dtype=object),
        ),
        image_root=image_root,
        user_features={"taste": {f"u{number}": "xyz"[number % 3] for number in range(num_users - 1)}},
    )


def with_dictionaries(raw: RawDataset) -> RawDataset:
    """Return the same data with its ids as dictionaries."""
    encoded = {name: pa.array(getattr(raw, name)).dictionary_encode() for name in ("user_id", "item_id")}
    return replace(raw, **encoded)
