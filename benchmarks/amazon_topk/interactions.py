"""Who interacted with what, split per user at random as the authors' public experiment does.

Two sources: the sequence files of Amazon 2014 5-core (order only, no features), and the `.inter` table that MMRec-style
repositories publish, which brings its own split.
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.errors import DataError

__all__ = ["PARTS", "Interactions", "read_inter", "read_sequences", "split_at_random"]

Ids = NDArray[np.int64]
PARTS = ("train", "validation", "test")
INTER_COLUMNS = ("userID", "itemID", "x_label")
SMALL_HISTORY = 10
"""Users with fewer interactions give one to validation and one to test [authors' code]."""


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """Users and items as whole numbers from 0, and which part of the split each interaction is in.

    Attributes:
        user: User of each interaction, ascending.
        item: Item of each interaction.
        part: 0 train, 1 validation, 2 test.
        num_users: Users, those without interactions included.
        num_items: Items of the catalogue.
        texts: A phrase for each item; empty where the source has none.
    """

    user: Ids
    item: Ids
    part: Ids
    num_users: int
    num_items: int
    texts: tuple[str, ...] = ()

    def pairs(self, part: str) -> tuple[Ids, Ids]:
        """Return users and items of one part, ordered by user."""
        chosen = self.part == PARTS.index(part)
        return self.user[chosen], self.item[chosen]

    def fingerprint(self) -> str:
        """Return a short hash of the interactions and their split, for the records."""
        table = np.stack([self.user, self.item, self.part])
        return hashlib.sha256(table[:, np.lexsort(table)].tobytes()).hexdigest()[:12]


def split_at_random(lengths: Ids, seed: int) -> Ids:
    """Return the part of each interaction, those of a user one after the other in any order.

    Fewer than 10 interactions: one to validation and one to test; else a tenth of them each, rounded down, and the
    rest to train [authors' code; the rounding is ours].

    Args:
        lengths: Interactions of each user, each at least 3 so that every part gets one.
        seed: Seed of the shuffle.

    Raises:
        DataError: If a user has fewer than 3 interactions.
    """
    if lengths.size and lengths.min() < 3:
        raise DataError(
            f"user {int(lengths.argmin())} has {lengths.min()} interactions, a split needs 3; filter the data"
        )
    generator = np.random.default_rng(seed)
    parts = []
    for length in lengths.tolist():
        held_out = 1 if length < SMALL_HISTORY else length // 10
        part = np.repeat([0, 1, 2], [length - 2 * held_out, held_out, held_out])
        parts.append(generator.permutation(part))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def read_sequences(folder: Path, seed: int) -> Interactions:
    """Read `sequential_data.txt` with `datamaps.json`, or `user_sequence.txt`, and the items' phrases; split at random.

    Args:
        folder: Folder of one data set: a line a user (the user, then the items), and
            `item_generative_indexing_phase_0.txt` (ASIN, then a phrase).
        seed: Seed of the split.

    Raises:
        DataError: If a file is missing, an item repeats within a user, or an item has no phrase.
    """
    numbered, named = folder / "sequential_data.txt", folder / "user_sequence.txt"
    source = numbered if numbered.is_file() else named
    try:
        rows = [line.split()[1:] for line in source.read_text(encoding="utf-8").splitlines()]
        phrase_lines = (folder / "item_generative_indexing_phase_0.txt").read_text(encoding="utf-8").splitlines()
        names = (
            json.loads((folder / "datamaps.json").read_text(encoding="utf-8"))["id2item"] if source == numbered else {}
        )
    except OSError as error:
        raise DataError(f"cannot read {error.filename}; {folder} must hold one of the sequence data sets") from error
    phrases = dict(line.split(" ", 1) for line in phrase_lines)
    items = sorted({name for row in rows for name in row}, key=lambda name: (len(name), name))
    index = {name: number for number, name in enumerate(items)}
    asins = [names.get(name, name) for name in items]
    lost = [asin for asin in asins if asin not in phrases]
    if lost:
        raise DataError(
            f"{len(lost)} items of {source} have no phrase, such as {lost[0]}; take both files from one place"
        )
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return _checked(
        np.repeat(np.arange(len(rows)), lengths),
        np.array([index[name] for row in rows for name in row], dtype=np.int64),
        split_at_random(lengths, seed),
        texts=tuple(phrases[asin] for asin in asins),
    )


def read_inter(path: Path) -> Interactions:
    """Read a tab-separated `.inter` table with the split that it comes with.

    Args:
        path: File with a heading that names at least `userID`, `itemID` (whole numbers from 0; row i of a feature file
            is item i) and `x_label` (0 train, 1 validation, 2 test).

    Raises:
        DataError: If the file cannot be read, lacks a column, or holds something else than such numbers.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t")
            lost = [name for name in INTER_COLUMNS if name not in (reader.fieldnames or ())]
            if lost:
                raise DataError(f"{path} lacks column {lost[0]}; its heading must name {', '.join(INTER_COLUMNS)}")
            rows = [[int(row[name]) for name in INTER_COLUMNS] for row in reader]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read {path}: {error}; see benchmarks/amazon_topk/README.md for its form") from error
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    if table.size == 0 or table.min() < 0 or table[:, 2].max() > 2:
        raise DataError(f"{path} must hold ids from 0 and x_label 0, 1 or 2, and at least one row; it does not")
    user, item, part = table[table[:, 0].argsort(kind="stable")].T.copy()
    return _checked(user, item, part)


def _checked(user: Ids, item: Ids, part: Ids, texts: tuple[str, ...] = ()) -> Interactions:
    """Return the interactions, or raise DataError if a pair repeats or leaves a user nothing to be sampled."""
    num_users, num_items = int(user.max()) + 1, max(int(item.max()) + 1, len(texts))
    if (np.diff(np.sort(user * num_items + item)) == 0).any():
        raise DataError("a user has the same item twice; keep the first of such interactions")
    most = int(np.bincount(user).argmax())
    if (user == most).sum() == num_items:
        raise DataError(f"user {most} has all {num_items} items, so none is left to sample; leave the user out")
    return Interactions(user=user, item=item, part=part, num_users=num_users, num_items=num_items, texts=texts)
