"""Data of your own as a folder of Parquet tables: events, items and, if there are any, users.

docs/data-format.md has their columns.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from torchrec_em3.datasets.ids import check_distinct
from torchrec_em3.datasets.parquet_table import ParquetTable
from torchrec_em3.datasets.picture_download import local_pictures
from torchrec_em3.datasets.plain_text import plain_text
from torchrec_em3.datasets.raw import RawDataset, RawItems
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["read_items", "read_parquet_folder"]

_MAX_TEXT = 2000  # characters; several times what any of the text encoders reads
_LABEL, _RATING = "label", "rating"

logger = logging.getLogger(__name__)


def read_parquet_folder(
    source: Path,
    tasks: Sequence[str] = (),
    images: Path | None = None,
    dense: Sequence[str] = (),
    sparse: Sequence[str] = (),
) -> RawDataset:
    """Read the tables `events` and `items` of a folder, and `users` if it is there.

    Args:
        source: The folder.
        tasks: Columns of the events that hold 0 or 1 and shall be predicted, the main one first. None takes `label` or,
            where there is no such column, `rating`, of which `prepare` makes a label by a threshold.
        images: Folder with the pictures that the items' column `image` names or, without that column, that are called
            `<item_id>.jpg` (.jpeg, .png, .webp); `images/` in `source` if not given.
        dense: Columns of the events that hold numbers to rank by, null where unknown.
        sparse: Columns of the events that hold categories to rank by, likewise.

    Returns:
        The data set. Items that only events name have no content; a warning counts them.

    Raises:
        DataError: With table, column and row, if a table is missing or damaged, lacks a column, has one of a type that
            does not suit, or null where a value must be.
        ConfigError: If a task or a feature is named twice, or a feature is what shall be predicted.
    """
    for option, columns in (("tasks", tasks), ("dense", dense), ("sparse", sparse)):
        if len(set(columns)) < len(columns):
            raise ConfigError(f"--{option} {','.join(columns)} names a column twice")
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: not a folder; give the folder that holds the pictures")
    events, users = _required(source, "events"), ParquetTable.find(source, "users")
    labels = {name: events.label(name) for name in tasks or _only_label(events)}
    for option, columns in (("dense", dense), ("sparse", sparse)):
        for name in columns:
            if name in (labels or (_RATING,)):
                raise ConfigError(f"--{option} names '{name}', which is what shall be predicted; leave it out")
    item_id = events.ids("item_id")
    root = source / "images" if images is None else images
    raw = RawDataset(
        name=source.resolve().name,
        user_id=events.ids("user_id"),
        item_id=item_id,
        rating=next(iter(labels.values())).astype(np.float32) if labels else events.numbers(_RATING),
        timestamp=events.seconds("timestamp"),
        items=read_items(_required(source, "items"), root, item_id.dictionary.to_pylist()),
        image_root=root,
        user_features={} if users is None else _read_features(users),
        labels=labels,
        dense={name: events.numbers(name, nullable=True) for name in dense},
        sparse={name: events.categories(name) for name in sparse},
    )
    logger.info("%s: %d events", events.place, len(raw.rating))
    return raw


def _required(source: Path, name: str) -> ParquetTable:
    table = ParquetTable.find(source, name)
    if table is None:
        raise DataError(f"{source}: neither {name}.parquet nor {name}/*.parquet is there")
    return table


def _only_label(events: ParquetTable) -> tuple[str, ...]:
    """Return the task of events for which none is named; none if labels are to be made of ratings."""
    if _LABEL in events.names:
        return (_LABEL,)
    if _RATING in events.names:
        return ()
    raise DataError(
        f"{events.place}: neither '{_LABEL}' nor '{_RATING}' among {', '.join(events.names)}; name the columns of 0 "
        "and 1 that shall be predicted with --tasks"
    )


def read_items(table: ParquetTable, image_root: Path, in_events: Iterable[str] = ()) -> RawItems:
    """Return the items of a table and then, without content, those that only events name.

    Args:
        table: Holds `item_id` and any of `title`, `text`, `image`, `category`.
        image_root: Folder of the pictures; `image` is relative to it.
        in_events: Item ids of the events.

    Raises:
        DataError: With table, column and row, if an id is null, empty or there twice, or a column does not suit.
    """
    item_id = _distinct_ids(table, "item_id")
    known = set(item_id)
    unknown = sorted({item for item in in_events if item} - known)
    if unknown:
        logger.warning(
            "%s: lacks %d items of the events (first: %s); they have no content", table.place, len(unknown), unknown[0]
        )
    columns = {name: table.texts(name) for name in ("title", "text", "image", "category") if name in table.names}
    title, text, category = (
        [plain_text(value)[:_MAX_TEXT] for value in columns.get(name, [""] * len(item_id))]
        for name in ("title", "text", "category")
    )
    if "image" not in columns:
        pictures = local_pictures(image_root)
        columns["image"] = [pictures.get(item, "") for item in item_id]
    if "text" not in columns:
        text = title

    def column(values: list[str]) -> np.ndarray:
        return np.array([*values, *[""] * len(unknown)], dtype=object)

    return RawItems(
        item_id=np.array([*item_id, *unknown], dtype=object),
        title=column(title),
        text=column(text),
        image=column(columns["image"]),
        category=column(category),
    )


def _read_features(table: ParquetTable) -> Mapping[str, Mapping[str, str]]:
    """Return each column but the id as a feature: value by user, without empty ones."""
    user_id = _distinct_ids(table, "user_id")
    features = {}
    for name in table.names:
        if name != "user_id":
            features[name] = {user: value for user, value in zip(user_id, table.texts(name), strict=True) if value}
    return features


def _distinct_ids(table: ParquetTable, name: str) -> list[str]:
    ids: list[str] = table.ids(name).to_pylist()
    check_distinct(ids, table.place, name, first_row=0)
    return ids
