"""Sequence files: the items of each user in time order, without times and ratings, as papers on sequences share them.

Recognised from the names of the files:

* `user_sequence.txt`: a line a user, user id and item ids (IDGenRec and others);
* `sequential_data.txt`: the same in numbers, which `datamaps.json` turns into ids where it is there (S3-Rec, P5);
* `*.inter.json`: items by user in numbers, which `*.user2id` and `*.item2id` turn into ids (LC-Rec, MQL4GRec).
"""

import logging
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from torchrec_em3.datasets.amazon_items import Product, describe_product, raw_items, read_products
from torchrec_em3.datasets.ids import IdNumbers
from torchrec_em3.datasets.plain_text import plain_text
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.records import decode_line, read_lines, read_object
from torchrec_em3.datasets.tables import find_file
from torchrec_em3.errors import DataError

__all__ = ["read_numbers", "read_sequences"]

_MAX_TEXT = 2000  # characters; several times what any of the text encoders reads
_MAX_TITLE = 80  # of a text that has no title, this many characters stand for one in reports

_Sequence = tuple[str, list[str]]
"""A user and that user's items in time order."""

logger = logging.getLogger(__name__)


def read_sequences(source: Path, metadata: Path | None = None, images: Path | None = None) -> RawDataset:
    """Read a folder with one sequence file and, where they are there, texts of the items.

    Args:
        source: The folder. Texts are read from `item_plain_text.txt`, `item_generative_indexing*.txt` (a line an item:
            id, then text) or `*.item.json` (title, brand, categories, description by number of item).
        metadata: Amazon metadata, absolute or relative to `source`, for items called by their ASIN; it stands above the
            texts of the folder.
        images: Folder with pictures `<item id>.jpg`.

    Returns:
        Events with rating 1 whose timestamp is their place in their user's sequence, so `timed` is false.

    Raises:
        DataError: With file and row, if there is not exactly one sequence file, or something in it is malformed.
    """
    if not source.is_dir():
        raise DataError(f"{source}: not a folder; give the folder that holds the sequence file")
    path, sequences = _open(source)
    users, items, places = _flatten(path, sequences)
    item_id = items.values
    products = _read_texts(source)
    if metadata is not None:
        products |= read_products(source / metadata, item_id.tolist())
    if not products:
        logger.warning("%s: no texts of the items", source)
    logger.info("%s: %d events of %d users on %d items", path, len(places), len(users.values), len(item_id))
    return RawDataset(
        name=source.resolve().name,
        user_id=users.encoded(),
        item_id=items.encoded(),
        rating=np.ones(len(places), dtype=np.float32),
        timestamp=places,
        items=raw_items(item_id, products, images),
        image_root=images if images is not None else source,
        timed=False,
    )


def _open(source: Path) -> tuple[Path, Iterator[tuple[str, _Sequence]]]:
    """Return the sequence file, and where each sequence stands with what it holds."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, _Sequence]]]] = {
        "user_sequence.txt": _read_lines_of_ids,
        "sequential_data.txt": _read_lines_of_numbers,
        "*.inter.json": _read_inter_json,
    }
    found = [(path, reader) for pattern, reader in readers.items() if (path := find_file(source, pattern))]
    if len(found) != 1:
        names = ", ".join(path.name for path, _ in found) or "none"
        raise DataError(f"{source}: expected one of {', '.join(readers)} (plain or .gz), found {names}")
    path, reader = found[0]
    return path, reader(path)


def _flatten(path: Path, sequences: Iterator[tuple[str, _Sequence]]) -> tuple[IdNumbers, IdNumbers, np.ndarray]:
    """Return user, item and place among the user's events of each event."""
    users, items, places = IdNumbers(), IdNumbers(), array("q")
    seen: dict[str, str] = {}
    for where, (user, sequence) in sequences:
        if not sequence:
            raise DataError(f"{where}: user '{user}' has no items; expected at least one")
        if user in seen:
            raise DataError(f"{where}: user '{user}' has a sequence already ({seen[user]}); expected one a user")
        seen[user] = where.removeprefix(f"{path} ")
        for item in sequence:
            users.add(user)
            items.add(item)
        places.extend(range(len(sequence)))
    if not places:
        raise DataError(f"{path}: the file holds no sequences")
    return users, items, np.frombuffer(places, dtype=np.int64)


def _read_lines_of_ids(path: Path) -> Iterator[tuple[str, _Sequence]]:
    for row, line in read_lines(path):
        user, *items = decode_line(path, row, line).split()
        yield f"{path} row {row}", (user, items)


def _read_lines_of_numbers(path: Path) -> Iterator[tuple[str, _Sequence]]:
    maps_path = find_file(path.parent, "datamaps.json")
    if maps_path is None:
        yield from _read_lines_of_ids(path)
        return
    users, items = _read_maps(maps_path)
    for where, (user, sequence) in _read_lines_of_ids(path):
        named = [_named(item, items, where, maps_path) for item in sequence]
        yield where, (_named(user, users, where, maps_path), named)


def _read_maps(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return user id and item id by number."""
    maps = read_object(path)
    found = []
    for name in ("user2id", "item2id"):
        if not isinstance(maps.get(name), dict):
            raise DataError(f"{path}: no object '{name}' among {', '.join(maps)[:80]}; expected number by id in it")
        found.append({str(number): raw_id for raw_id, number in maps[name].items()})
    return found[0], found[1]


def _read_inter_json(path: Path) -> Iterator[tuple[str, _Sequence]]:
    users, items = (read_numbers(path.parent, kind) for kind in ("user", "item"))
    for user, sequence in read_object(path).items():
        where = f"{path} user {user}"
        if not isinstance(sequence, list) or not all(isinstance(item, int | str) for item in sequence):
            raise DataError(f"{where}: holds {str(sequence)[:40]}, expected a list of items")
        named = [_named(str(item), items, where, f"*.item2id of {path.parent}") for item in sequence]
        yield where, (_named(user, users, where, f"*.user2id of {path.parent}"), named)


def _named(number: str, id_of: Mapping[str, str], where: str, source: Path | str) -> str:
    """Return the id behind a number; where nothing names any, numbers are the ids."""
    if not id_of:
        return number
    if number not in id_of:
        raise DataError(f"{where}: number {number[:40]} is not in {source}")
    return id_of[number]


def read_numbers(folder: Path, kind: str) -> dict[str, str]:
    """Return id by number from `*.user2id` or `*.item2id`: a line each, id and number with a tab between.

    Args:
        folder: Where the file is looked for; nothing is returned if there is none.
        kind: "user" or "item".

    Raises:
        DataError: With file and row, if a line is malformed or a number is there twice.
    """
    path = find_file(folder, f"*.{kind}2id")
    if path is None:
        return {}
    found = {}
    for row, line in read_lines(path):
        fields = decode_line(path, row, line).split()
        if len(fields) != 2 or fields[1] in found:
            raise DataError(f"{path} row {row}: {len(fields)} fields, expected id and number, each number once")
        found[fields[1]] = fields[0]
    return found


def _read_texts(source: Path) -> dict[str, Product]:
    if path := find_file(source, "*.item.json"):
        items = read_numbers(source, "item")
        found = {number: record for number, record in read_object(path).items() if isinstance(record, dict)}
        return {items.get(number, number): describe_product(record) for number, record in found.items()}
    for pattern in ("item_plain_text.txt", "item_generative_indexing*.txt"):
        if path := find_file(source, pattern):
            return {item: Product(title=text[:_MAX_TITLE], text=text) for item, text in _read_lines_of_text(path)}
    return {}


def _read_lines_of_text(path: Path) -> Iterator[tuple[str, str]]:
    for row, line in read_lines(path):
        item, _, text = decode_line(path, row, line).strip().partition(" ")
        yield item, plain_text(text)[:_MAX_TEXT]
