"""What must hold of raw data before it is worth indexing: vectorised, one clear line for the first thing wrong."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["arrow_strings", "check_events", "check_raw", "check_task_names", "encode_ids"]

# Year 3000 in seconds: a larger number is milliseconds or something else.
_MAX_TIMESTAMP = 32_503_680_000
_PLAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = frozenset({"user", "target", "history", "item", "raw_id", "train_count"})


def arrow_strings(ids: np.ndarray) -> pa.Array:
    """Return an array of str as one arrow array; pyarrow itself splits large ones."""
    array = pa.array(ids, type=pa.string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def encode_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids in string order and, for each entry of `ids`, its position among them (int64)."""
    encoded = arrow_strings(ids).dictionary_encode()
    values = np.asarray(encoded.dictionary.to_pylist(), dtype=str)
    order = np.argsort(values, kind="stable")
    position = np.empty(len(values), dtype=np.int64)
    position[order] = np.arange(len(values))
    return values[order], position[encoded.indices.to_numpy()]


def check_events(
    user_id: np.ndarray,
    item_id: np.ndarray,
    rating: np.ndarray,
    timestamp: np.ndarray,
    *,
    source: str,
    first_row: int = 0,
    rating_range: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Check the columns of the events.

    Args:
        user_id: str.
        item_id: str.
        rating: Floating point.
        timestamp: Seconds since 1970, integers.
        source: File or data set, for the messages.
        first_row: Number of the first event in `source`, for the messages.
        rating_range: Smallest and largest rating allowed.

    Raises:
        DataError: If there is no event, columns differ in length or type, an id is empty, a rating is not finite or out
            of range, a timestamp is negative or not in seconds, or two events agree in user, item and timestamp.
    """
    columns = {"user_id": user_id, "item_id": item_id, "rating": rating, "timestamp": timestamp}
    kinds = {"user_id": "UO", "item_id": "UO", "rating": "f", "timestamp": "iu"}
    for name, column in columns.items():
        if column.ndim != 1 or len(column) != len(user_id):
            raise DataError(f"{source}: {name} has shape {list(column.shape)}, expected [{len(user_id)}] as user_id")
        if column.dtype.kind not in kinds[name]:
            expected = {"UO": "str", "f": "floating point", "iu": "integer"}[kinds[name]]
            raise DataError(f"{source}: {name} has dtype {column.dtype}, expected {expected}")
    if len(user_id) == 0:
        raise DataError(f"{source}: no events; a data set needs at least one")

    def refuse(name: str, bad: np.ndarray, rule: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(f"{source} row {row + first_row}: {name} is {columns[name][row]!s:.40}, {rule}")

    refuse("rating", ~np.isfinite(rating), "which is not a finite number")
    low, high = rating_range
    refuse("rating", (rating < low) | (rating > high), f"outside {low:g}..{high:g}")
    refuse("timestamp", timestamp < 0, "before 1970; expected seconds since 1970")
    refuse("timestamp", timestamp > _MAX_TIMESTAMP, "after the year 3000; expected seconds, not milliseconds")
    _check_ids_and_repeats(user_id, item_id, timestamp, source, first_row)


def check_raw(raw: RawDataset, *, events_checked: bool = False) -> None:
    """Check a whole raw data set.

    Args:
        raw: The data set.
        events_checked: True if `check_events` has passed already.

    Raises:
        DataError: Whatever `check_events` refuses; or if catalogue columns differ in length; an item id is empty,
            repeated or, though an event has it, missing; an image lies outside `image_root`; a feature's name is taken
            or not plain; a name of codes is; a label is neither 0 nor 1; or a click probability is outside 0..1.
        ConfigError: If the name of a task is not plain.
    """
    source = f"data set '{raw.name}'"
    if not events_checked:
        check_events(raw.user_id, raw.item_id, raw.rating, raw.timestamp, source=source)
    _check_items(raw, source)
    for name in raw.user_features:
        if not _PLAIN_NAME.fullmatch(name) or name in _RESERVED:
            raise DataError(
                f"{source}: user feature '{name}' needs another name: small letters, digits and '_', and none of "
                f"{', '.join(sorted(_RESERVED))}"
            )
    for name in raw.codes:
        if not _PLAIN_NAME.fullmatch(name) or name in ("text", "image"):
            raise DataError(
                f"{source}: codes '{name}' need another name: small letters, digits and '_', neither text nor image"
            )
    _check_labels(raw, source)
    if raw.probability is not None:
        if raw.probability.shape != raw.rating.shape:
            shape = list(raw.probability.shape)
            raise DataError(f"{source}: probability has shape {shape}, expected [{len(raw.rating)}] as user_id")
        bad = ~((raw.probability >= 0) & (raw.probability <= 1))
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(f"{source} row {row}: probability is {raw.probability[row]}, outside 0..1")


def check_task_names(names: Iterable[str]) -> None:
    """Raise ConfigError if a name cannot stand in a column's name, an option and a log."""
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise ConfigError(f"task '{name}' needs another name: small letters, digits and '_', a letter first")


def _check_labels(raw: RawDataset, source: str) -> None:
    check_task_names(raw.labels)
    for name, label in raw.labels.items():
        if label.shape != raw.rating.shape:
            shape = list(label.shape)
            raise DataError(f"{source}: labels['{name}'] has shape {shape}, expected [{len(raw.rating)}] as user_id")
        bad = (label != 0) & (label != 1)
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(f"{source} row {row}: labels['{name}'] is {label[row]}, must be 0 or 1")


def _check_ids_and_repeats(
    user_id: np.ndarray, item_id: np.ndarray, timestamp: np.ndarray, source: str, first_row: int
) -> None:
    users, user = encode_ids(user_id)
    items, item = encode_ids(item_id)
    for name, values, codes in (("user_id", users, user), ("item_id", items, item)):
        if values[0] == "":
            raise DataError(f"{source} row {int(np.argmax(codes == 0)) + first_row}: {name} is empty")
    pair = user * len(items) + item
    order = np.lexsort((timestamp, pair))
    again = (np.diff(pair[order]) == 0) & (np.diff(timestamp[order]) == 0)
    if again.any():
        rows = order[1:][again]
        row = int(rows.min())
        first = first_row + int(np.argmax((pair == pair[row]) & (timestamp == timestamp[row])))
        raise DataError(
            f"{source} row {row + first_row}: user_id {user_id[row]}, item_id {item_id[row]} and timestamp "
            f"{timestamp[row]} repeat row {first} ({again.sum()} such rows); keep one of each"
        )


def _check_items(raw: RawDataset, source: str) -> None:
    items = raw.items
    for name in ("title", "text", "image", "category"):
        column = getattr(items, name)
        if column.shape != items.item_id.shape:
            shape, expected = list(column.shape), list(items.item_id.shape)
            raise DataError(f"{source}: items.{name} has shape {shape}, expected {expected} as items.item_id")
    ids, codes = encode_ids(items.item_id)
    if len(ids) == 0 or ids[0] == "":
        raise DataError(
            f"{source}: an item of the catalogue has an empty item_id" if len(ids) else f"{source}: no items"
        )
    if len(ids) < len(codes):
        counts = np.bincount(codes)
        repeated = ids[np.argmax(counts)]
        raise DataError(f"{source}: item_id '{repeated}' stands in the catalogue {counts.max()} times; keep one")
    known = pc.is_in(arrow_strings(raw.item_id), value_set=arrow_strings(ids)).to_numpy(zero_copy_only=False)
    if not known.all():
        row = int(np.argmin(known))
        raise DataError(f"{source} row {row}: item_id '{raw.item_id[row]}' is not in the catalogue; add it to items")
    for item_id, image in zip(items.item_id, items.image, strict=True):
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{source}: image '{image}' of item '{item_id}' must be relative to image_root and inside it"
            )
