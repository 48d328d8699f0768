"""What must hold of raw data before it is worth indexing: vectorised, one clear line for the first thing wrong."""

import re
from collections.abc import Iterable, Set
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_em3.datasets.ids import Ids, arrow_strings, encode_ids, look_up, to_dictionary
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.user_groups import repeated_rows
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["check_events", "check_raw", "check_task_names"]

# Year 3000 in seconds: a larger number is milliseconds or something else.
_MAX_TIMESTAMP = 32_503_680_000
_PLAIN_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = frozenset({"user", "target", "history", "item", "raw_id", "train_count"})


def check_events(
    user_id: Ids,
    item_id: Ids,
    rating: np.ndarray,
    timestamp: np.ndarray,
    *,
    source: str,
    first_row: int = 0,
    rating_range: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Check the columns of the events.

    Args:
        user_id: str, or a dictionary of them.
        item_id: str, or a dictionary of them.
        rating: Floating point.
        timestamp: Seconds since 1970, integers.
        source: File or data set, for the messages.
        first_row: Number of the first event in `source`, for the messages.
        rating_range: Smallest and largest rating allowed.

    Raises:
        DataError: If there is no event, columns differ in length or type, an id is null or empty, a rating is not
            finite or out of range, a timestamp is negative or not in seconds, or two events agree in user, item and
            timestamp.
    """
    columns = {"rating": rating, "timestamp": timestamp}
    expected = {"user_id": "str", "item_id": "str", "rating": "floating point", "timestamp": "integer"}
    for name, column in {"user_id": user_id, "item_id": item_id, **columns}.items():
        shape = [len(column)] if isinstance(column, pa.DictionaryArray) else list(column.shape)
        if shape != [len(user_id)]:
            raise DataError(f"{source}: {name} has shape {shape}, expected [{len(user_id)}] as user_id")
        if not _has_kind(column, expected[name]):
            dtype = column.type if isinstance(column, pa.DictionaryArray) else column.dtype
            raise DataError(f"{source}: {name} has dtype {dtype}, expected {expected[name]}")
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
    _check_ids_and_repeats(to_dictionary(user_id), to_dictionary(item_id), timestamp, source, first_row)


def check_raw(raw: RawDataset, *, events_checked: bool = False) -> None:
    """Check a whole raw data set.

    Args:
        raw: The data set.
        events_checked: True if `check_events` has passed already.

    Raises:
        DataError: Whatever `check_events` refuses; or if catalogue columns differ in length; an item id is empty,
            repeated or, though an event has it, missing; an image lies outside `image_root`; a feature's name is taken
            or not plain; a name of codes is; a label is neither 0 nor 1; a dense feature is infinite; or a click
            probability is outside 0..1.
        ConfigError: If the name of a task is not plain.
    """
    source = f"data set '{raw.name}'"
    if not events_checked:
        check_events(raw.user_id, raw.item_id, raw.rating, raw.timestamp, source=source)
    _check_items(raw, source)
    _check_feature_names("user", raw.user_features, _RESERVED, source)
    _check_feature_names("dense", raw.dense, _RESERVED | raw.user_features.keys(), source)
    _check_feature_names("sparse", raw.sparse, _RESERVED | raw.user_features.keys() | raw.dense.keys(), source)
    for name in raw.codes:
        if not _PLAIN_NAME.fullmatch(name) or name in ("text", "image"):
            raise DataError(
                f"{source}: codes '{name}' need another name: small letters, digits and '_', neither text nor image"
            )
    _check_labels(raw, source)
    _check_event_features(raw, source)
    if raw.probability is not None:
        if raw.probability.shape != raw.rating.shape:
            shape = list(raw.probability.shape)
            raise DataError(f"{source}: probability has shape {shape}, expected [{len(raw.rating)}] as user_id")
        bad = ~((raw.probability >= 0) & (raw.probability <= 1))
        _refuse_first(source, "probability", raw.probability, bad, "outside 0..1")


def check_task_names(names: Iterable[str]) -> None:
    """Raise ConfigError if a name cannot stand in a column's name, an option and a log."""
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise ConfigError(f"task '{name}' needs another name: small letters, digits and '_', a letter first")


def _has_kind(column: Ids, kind: str) -> bool:
    if isinstance(column, pa.DictionaryArray):
        return kind == "str" and pa.types.is_string(column.type.value_type)
    return column.dtype.kind in {"str": "UO", "floating point": "f", "integer": "iu"}[kind]


def _refuse_first(source: str, name: str, values: np.ndarray, bad: np.ndarray, rule: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{source} row {row}: {name} is {values[row]}, {rule}")


def _check_feature_names(kind: str, names: Iterable[str], taken: Set[str], source: str) -> None:
    for name in names:
        if not _PLAIN_NAME.fullmatch(name) or name in taken:
            raise DataError(
                f"{source}: {kind} feature '{name}' needs another name: small letters, digits and '_', and none of "
                f"{', '.join(sorted(taken))}"
            )


def _check_event_features(raw: RawDataset, source: str) -> None:
    for name, value in raw.dense.items():
        if value.shape != raw.rating.shape or value.dtype.kind != "f":
            found = f"{value.dtype} {list(value.shape)}"
            raise DataError(f"{source}: dense['{name}'] is {found}, expected floating point [{len(raw.rating)}]")
        _refuse_first(source, f"dense['{name}']", value, np.isinf(value), "must be finite, or NaN if unknown")
    for name, ids in raw.sparse.items():
        if len(ids) != len(raw.rating) or not _has_kind(ids, "str"):
            kind = ids.type if isinstance(ids, pa.DictionaryArray) else ids.dtype
            raise DataError(f"{source}: sparse['{name}'] is {kind} [{len(ids)}], expected str [{len(raw.rating)}]")


def _check_labels(raw: RawDataset, source: str) -> None:
    check_task_names(raw.labels)
    for name, label in raw.labels.items():
        if label.shape != raw.rating.shape:
            shape = list(label.shape)
            raise DataError(f"{source}: labels['{name}'] has shape {shape}, expected [{len(raw.rating)}] as user_id")
        _refuse_first(source, f"labels['{name}']", label, (label != 0) & (label != 1), "must be 0 or 1")


def _check_ids_and_repeats(
    user_id: pa.DictionaryArray, item_id: pa.DictionaryArray, timestamp: np.ndarray, source: str, first_row: int
) -> None:
    for name, ids in (("user_id", user_id), ("item_id", item_id)):
        if ids.null_count:
            row = int(np.argmax(ids.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{source} row {row + first_row}: {name} is null")
    users, user = encode_ids(user_id)
    items, item = encode_ids(item_id)
    for name, values, codes in (("user_id", users, user), ("item_id", items, item)):
        if values[0] == "":
            raise DataError(f"{source} row {int(np.argmax(codes == 0)) + first_row}: {name} is empty")
    repeated = repeated_rows(user, item, timestamp, len(users), progress="check events")
    if len(repeated):
        row = int(repeated[0])
        same = (user == user[row]) & (item == item[row]) & (timestamp == timestamp[row])
        first = int(np.argmax(same)) + first_row
        raise DataError(
            f"{source} row {row + first_row}: user_id {users[user[row]]}, item_id {items[item[row]]} and timestamp "
            f"{timestamp[row]} repeat row {first} ({len(repeated)} such rows); keep one of each"
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
    named, code = encode_ids(raw.item_id)
    known = pc.is_in(arrow_strings(named), value_set=arrow_strings(ids)).to_numpy(zero_copy_only=False)
    if not known.all():
        row = int(np.argmin(look_up(known, code)))
        raise DataError(f"{source} row {row}: item_id '{named[code[row]]}' is not in the catalogue; add it to items")
    for item_id, image in zip(items.item_id, items.image, strict=True):
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{source}: image '{image}' of item '{item_id}' must be relative to image_root and inside it"
            )
