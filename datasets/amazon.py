"""Amazon Reviews of 2014, 2018 and 2023: reviews or ratings, 5-core or full, with metadata and pictures of the items.

Year and kind of each file are recognised from its fields, not from its name.
"""

import logging
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from torchrec_em3.datasets.amazon_items import CONTENT_FIELDS, ITEM_FIELDS, Product, raw_items, read_products
from torchrec_em3.datasets.ids import IdNumbers, count_codes, ids_from_codes
from torchrec_em3.datasets.picture_download import PictureLimits, download_pictures
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.records import Record, bare_name, is_utf8, read_records
from torchrec_em3.datasets.tables import first_line
from torchrec_em3.datasets.user_groups import repeated_rows
from torchrec_em3.errors import DataError

__all__ = ["read_amazon"]

_SUFFIXES = (".json", ".jsonl", ".csv")
_RATING_RANGE = (0.0, 5.0)
# 1995 to 2100: Amazon is no older, and seconds and milliseconds taken for each other fall outside.
_TIME_RANGE = (788_918_400, 4_102_444_800)
_ASIN = re.compile(r"[B0-9][0-9A-Z]{9}")
_DIGITS = re.compile(r"[0-9]{1,18}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Form:
    """What one generation of review files calls its fields, and how many of its time units make a second."""

    user: str
    item: str
    rating: str
    time: str
    per_second: int

    @property
    def names(self) -> tuple[str, str, str, str]:
        return self.user, self.item, self.rating, self.time


_FORM_2018 = _Form("reviewerID", "asin", "overall", "unixReviewTime", 1)  # and 2014
_FORM_2023 = _Form("user_id", "parent_asin", "rating", "timestamp", 1000)


@dataclass(frozen=True)
class _Events:
    """Events as columns; ids are numbered in order of appearance."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    timestamp: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray


def read_amazon(
    source: Path,
    reviews: Path | None = None,
    metadata: Path | None = None,
    images: Path | None = None,
    download: PictureLimits | None = None,
) -> RawDataset:
    """Read a folder with Amazon reviews or ratings and, where it is there, the metadata of the items.

    Files are read a line at a time: what is kept of an event are four numbers, of an item its text, and items that
    nobody reviewed are left out.

    Args:
        source: The folder.
        reviews: Reviews or ratings file, absolute or relative to `source`, where the folder holds several.
        metadata: Metadata file, likewise.
        images: Folder with pictures `<asin>.jpg`; `source/images` if not given.
        download: Fetch the pictures that the folder lacks, within these limits; None fetches nothing.

    Returns:
        All events in file order, except that of events that agree in user, item and second only the first is there.

    Raises:
        DataError: With file, row and field, for whatever is missing, malformed or out of range.
    """
    if not source.is_dir():
        raise DataError(f"{source}: not a folder; give the folder that holds the reviews file")
    reviews, metadata = _find_files(source, reviews, metadata)
    events = _drop_repeats(_read_events(reviews), reviews)
    products = read_products(metadata, events.item_ids.tolist()) if metadata is not None else {}
    if metadata is None:
        logger.warning("%s: no metadata; items have no text", source)
    folder = images if images is not None else source / "images"
    if download is not None:
        _download(events, products, folder, download)
    logger.info(
        "%s: %d events of %d users on %d items",
        *(reviews, len(events.user), len(events.user_ids), len(events.item_ids)),
    )
    return RawDataset(
        name=source.resolve().name,
        user_id=ids_from_codes(events.user, events.user_ids),
        item_id=ids_from_codes(events.item, events.item_ids),
        rating=events.rating,
        timestamp=events.timestamp,
        items=raw_items(events.item_ids, products, folder if images is not None or folder.is_dir() else None),
        image_root=folder,
    )


def _download(events: _Events, products: dict[str, Product], folder: Path, limits: PictureLimits) -> None:
    by_count = np.argsort(-count_codes(events.item, len(events.item_ids)), kind="stable")
    wanted = {item: products[item].picture for item in events.item_ids[by_count].tolist() if item in products}
    download_pictures({item: address for item, address in wanted.items() if address}, folder, limits)


def _find_files(source: Path, reviews: Path | None, metadata: Path | None) -> tuple[Path, Path | None]:
    for path in (reviews, metadata):
        if path is not None and not (source / path).is_file():
            raise DataError(f"{source / path}: no such file; give its name in {source} or its absolute path")
    found: dict[str, list[Path]] = {"reviews": [], "metadata": []}
    unused = []
    for path in sorted(source.iterdir()):
        if not path.is_file() or not bare_name(path).endswith(_SUFFIXES):
            continue
        try:
            kind = _kind(path)
        except DataError as error:
            kind = None
            unused.append(str(error))
        if kind is not None:
            found[kind].append(path)
    if reviews is None and not found["reviews"]:
        raise DataError(
            f"{source}: no Amazon reviews recognised among its files (*{', *'.join(_SUFFIXES)}, plain or .gz); name "
            f"them with --reviews{'; not used: ' + unused[0] if unused else ''}"
        )
    for line in unused:
        logger.warning("not used: %s", line)
    chosen: dict[str, Path | None] = {}
    for kind, named in (("reviews", reviews), ("metadata", metadata)):
        if named is None and len(found[kind]) > 1:
            names = ", ".join(path.name for path in found[kind])
            raise DataError(f"{source}: several files with {kind} ({names}); name the one to read with --{kind}")
        if named is not None and _kind(source / named) != kind:
            raise DataError(f"{source / named}: holds no Amazon {kind}, judged by its first record")
        chosen[kind] = source / named if named is not None else next(iter(found[kind]), None)
    assert chosen["reviews"] is not None
    return chosen["reviews"], chosen["metadata"]


def _kind(path: Path) -> str | None:
    """Return what a file holds, judged by its first record: "reviews", "metadata" or neither."""
    record = next(_records(path), (0, {}))[1]
    if _form_of(record) is not None:
        return "reviews"
    described = any(name in record for name in ITEM_FIELDS) and any(name in record for name in CONTENT_FIELDS)
    return "metadata" if described else None


def _form_of(record: Record) -> _Form | None:
    forms = (_FORM_2018, _FORM_2023)
    return next((form for form in forms if form.user in record and form.item in record), None)


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    names: tuple[str, ...] = ()
    if bare_name(path).endswith(".csv"):
        names = _names_without_header(first_line(path).split(","))
    return read_records(path, names)


def _names_without_header(fields: list[str]) -> tuple[str, ...]:
    """Return the names of the columns of a ratings file of 2014 (user first) or 2018 (item first); () if it has any."""
    if len(fields) != 4 or not _DIGITS.fullmatch(fields[3].partition(".")[0]):
        return ()
    user, item, rating, time = _FORM_2018.names
    if _ASIN.fullmatch(fields[0]) and not _ASIN.fullmatch(fields[1]):
        return item, user, rating, time
    return user, item, rating, time


def _read_events(path: Path) -> _Events:
    users, items, ratings, times = IdNumbers(), IdNumbers(), array("f"), array("q")
    form: _Form | None = None
    for row, record in tqdm(_records(path), desc="read events", unit="event", unit_scale=True, disable=None):
        form = form or _form_of(record)
        if form is None:
            raise DataError(
                f"{path} row {row}: neither {', '.join(_FORM_2018.names)} nor {', '.join(_FORM_2023.names)} among "
                f"{', '.join(record)[:80]}"
            )
        where = f"{path} row {row}"
        users.add(_id(record, form.user, where))
        items.add(_id(record, form.item, where))
        ratings.append(_rating(record, form.rating, where))
        times.append(_time(record, form, where))
    if form is None:
        raise DataError(f"{path}: the file holds no events; expected {', '.join(_FORM_2018.names)} in each row")
    return _Events(
        user=users.numbers,
        item=items.numbers,
        rating=np.frombuffer(ratings, dtype=np.float32),
        timestamp=np.frombuffer(times, dtype=np.int64),
        user_ids=users.values,
        item_ids=items.values,
    )


def _field(record: Record, name: str, where: str) -> Any:
    if record.get(name) is None:
        raise DataError(f"{where}: no {name} among {', '.join(record)[:80]}")
    return record[name]


def _id(record: Record, name: str, where: str) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str) or not value.strip() or not is_utf8(value):
        raise DataError(f"{where}: {name} is {value!r:.40}, expected an id")
    return value.strip()


def _rating(record: Record, name: str, where: str) -> float:
    value = _field(record, name, where)
    try:
        rating = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: {name} is {value!r:.40}, which is not a number") from error
    low, high = _RATING_RANGE
    if not math.isfinite(rating):
        raise DataError(f"{where}: {name} is {rating}, which is not a finite number")
    if not low <= rating <= high:
        raise DataError(f"{where}: {name} is {rating:g}, outside {low:g}..{high:g}")
    return rating


def _time(record: Record, form: _Form, where: str) -> int:
    value = _field(record, form.time, where)
    if not _DIGITS.fullmatch(str(value).removesuffix(".0")):
        raise DataError(f"{where}: {form.time} is {value!r:.40}, which is not a whole number")
    seconds = int(float(value)) // form.per_second
    if not _TIME_RANGE[0] <= seconds <= _TIME_RANGE[1]:
        unit = "seconds" if form.per_second == 1 else "milliseconds"
        raise DataError(f"{where}: {form.time} is {value!s:.40}, outside 1995..2100; expected {unit} since 1970")
    return seconds


def _drop_repeats(events: _Events, path: Path) -> _Events:
    """Keep the first of the events that agree in user, item and second, such as one review shown for two variants."""
    repeated = repeated_rows(events.user, events.item, events.timestamp, len(events.user_ids))
    if not len(repeated):
        return events
    logger.warning("%s: %d events agree with an earlier one in user, item and second; left out", path, len(repeated))
    kept = np.ones(len(events.user), dtype=bool)
    kept[repeated] = False
    return replace(
        events,
        user=events.user[kept],
        item=events.item[kept],
        rating=events.rating[kept],
        timestamp=events.timestamp[kept],
    )
