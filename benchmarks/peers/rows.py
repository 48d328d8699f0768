"""The training rows that every contender reads: drawn once, kept in one .npz.

Only numpy is imported here, for the workers run in other environments than the project's.

Shape letters: R rows, L longest history.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Rows", "draw_rows"]

ZIPF_EXPONENT = 1.1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a click-through data set in padded form; ids begin with 1, 0 is padding.

    Attributes:
        user: User of each row, int64 [R]; no user has two rows.
        item: Target of each row, int64 [R].
        history: Items before the target, int64 [R, L], zeros behind the last.
        length: How many items the history has, int64 [R].
        label: 0.0 or 1.0, float32 [R].
        num_users: Users of the user table; most of them have no row.
        num_items: Items of the catalogue.
        batch_size: Rows of a step; divides R.
    """

    user: np.ndarray
    item: np.ndarray
    history: np.ndarray
    length: np.ndarray
    label: np.ndarray
    num_users: int
    num_items: int
    batch_size: int

    @classmethod
    def read(cls, path: Path) -> "Rows":
        """Return what `write` wrote."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        values: dict[str, Any] = {name: array if array.ndim else int(array) for name, array in arrays.items()}
        return cls(**values)

    def write(self, path: Path) -> None:
        """Write one array an attribute."""
        np.savez(path, **asdict(self))

    def batches(self) -> Iterator["Rows"]:
        """Yield the rows of one step after the other."""
        for start in range(0, len(self.user), self.batch_size):
            yield self.part(start, start + self.batch_size)

    def part(self, start: int, stop: int) -> "Rows":
        """Return the rows `start` to `stop` - 1."""
        rows = {name: getattr(self, name)[start:stop] for name in ("user", "item", "history", "length", "label")}
        return Rows(**rows, num_users=self.num_users, num_items=self.num_items, batch_size=self.batch_size)


def draw_rows(
    *, num_batches: int, batch_size: int, num_users: int, num_items: int, max_history: int, fill: float, seed: int = 0
) -> Rows:
    """Draw rows with Zipf distributed items.

    Args:
        num_batches: Batches to draw.
        batch_size: Rows of a batch.
        num_users: Users; at least as many as rows.
        num_items: Items of the catalogue.
        max_history: Longest history L.
        fill: Mean share of L that a history fills, from 0.5 to 1. Lengths are uniform between (2 * fill - 1) * L, but
            at least 1, and L.
        seed: Seed of everything.
    """
    num_rows = num_batches * batch_size
    if num_rows > num_users:
        raise ValueError(
            f"{num_batches} batches of {batch_size} rows need as many users, more than --num_users {num_users}; "
            "lower --batches"
        )
    if not 0.5 <= fill <= 1.0:
        raise ValueError(f"--fill is {fill}, must be from 0.5 to 1")
    random = np.random.default_rng(seed)
    shortest = max(1, round((2.0 * fill - 1.0) * max_history))
    length = random.integers(shortest, max_history + 1, num_rows)
    history = random.zipf(ZIPF_EXPONENT, (num_rows, max_history)) % num_items + 1
    return Rows(
        user=random.permutation(num_users)[:num_rows] + 1,
        item=random.zipf(ZIPF_EXPONENT, num_rows) % num_items + 1,
        history=np.where(np.arange(max_history) < length[:, None], history, 0),
        length=length,
        label=random.integers(0, 2, num_rows).astype(np.float32),
        num_users=num_users,
        num_items=num_items,
        batch_size=batch_size,
    )
