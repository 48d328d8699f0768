"""How much memory and time `em3 prepare` takes for many events.

    OMP_NUM_THREADS=1 python benchmarks/prepare_scale.py [--num_events 5000000] [--num_users 500000]

Makes events of users who are equally active on items that are Zipf distributed, and checks and prepares them without
encoders. Prints the peak resident memory of the process after each stage; what a stage adds is what it held beyond all
stages before.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from torchrec_em3.datasets.checks import check_raw
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.raw import RawDataset, RawItems

ZIPF_EXPONENT = 1.1
ID_TYPE = "U10"
"""Ids of ten characters, as Amazon's items have; numpy keeps 4 bytes a character."""


def main(num_events: int = 5_000_000, num_users: int = 500_000, num_items: int = 100_000) -> None:
    """Print a line for the raw events, one for the checks and one for the whole of prepare, which checks again.

    Args:
        num_events: Events.
        num_users: Users, equally active.
        num_items: Items of the catalogue.
    """
    raw = make_events(num_events, num_users, num_items)
    columns = (raw.user_id, raw.item_id, raw.rating, raw.timestamp)
    held = sum(column.nbytes for column in columns) / num_events
    print(f"{num_events} raw events of {held:.0f} bytes: peak {peak_gib():.2f} GiB", flush=True)
    check_raw(raw)
    print(f"checked: peak {peak_gib():.2f} GiB", flush=True)
    options = PrepareOptions(label_threshold=None, text_encoder="none", image_encoder="none")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare(raw, Path(folder) / "data", options)
        seconds = time.perf_counter() - started
    print(f"prepared in {seconds:.1f} s, {num_events / seconds:,.0f} events/s: peak {peak_gib():.2f} GiB")


def make_events(num_events: int, num_users: int, num_items: int) -> RawDataset:
    """Return events in time order."""
    random = np.random.default_rng(0)
    users, items = (np.arange(count).astype(ID_TYPE) for count in (num_users, num_items))
    empty = np.full(num_items, "")
    return RawDataset(
        name="synthetic",
        user_id=users[random.integers(0, num_users, num_events, np.int32)],
        item_id=items[random.zipf(ZIPF_EXPONENT, num_events) % num_items],
        rating=random.integers(0, 2, num_events, np.int8).astype(np.float32),
        timestamp=np.arange(num_events, dtype=np.int64),
        items=RawItems(items, items, empty, empty, empty),
        image_root=Path(),
    )


def peak_gib() -> float:
    """Return the largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0**2


if __name__ == "__main__":
    auto_cli(main)
