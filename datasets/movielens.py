"""MovieLens as its publisher and RecBole ship it: ml-100k, ml-1m (10m too), the csv form of ml-latest, 20m, 25m, 32m.

The form is recognised from the files. Movies, users, `items.csv` (plots) and `posters/` are used where they are there.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchrec_em3.datasets.checks import check_events, check_raw
from torchrec_em3.datasets.ids import check_distinct
from torchrec_em3.datasets.movielens_catalogue import read_catalogue
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.tables import Layout, column_names, find_file, first_line, read_table, text_column
from torchrec_em3.errors import DataError

__all__ = ["read_movielens"]

_EVENT_FIELDS = ("user_id", "item_id", "rating", "timestamp")
_EVENT_TYPES: Mapping[str, pa.DataType] = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
}
_RATINGS_FILES = ("u.data", "*.inter", "ratings.dat", "ratings.csv")
_RATING_RANGE = (0.5, 5.0)

_TYPED = Layout("\t", typed_header=True)
_CSV_RATINGS = Layout(",", quoted=True, renames=(("userId", "user_id"), ("movieId", "item_id")))
_USERS_100K = Layout("|", names=("user_id", "age", "gender", "occupation", "zip_code"), latin1=True)
_USERS_1M = Layout("::", names=("user_id", "gender", "age", "occupation", "zip_code"), latin1=True)

# Lower ends of the publisher's age groups of ml-1m; ml-100k, which gives years, is put into the same groups.
_AGE_GROUPS = np.array([1, 18, 25, 35, 45, 50, 56])


def read_movielens(source: Path, ratings: Path | None = None) -> RawDataset:
    """Read a folder that holds MovieLens in any of its forms, plain or gzip.

    Args:
        source: The folder. Beside the ratings it may hold the movies and users files of any form, an `items.csv`
            (UTF-8; `item_id` or `movie_id`, and any of `title`, `genres`, `plot`, `abstract`, `poster`) and
            `posters/<id>.jpg`.
        ratings: Ratings file of another name, absolute or relative to `source`, whose first row tells its form.

    Returns:
        All ratings in file order, every movie that any file names, and gender, age group and occupation of the users
        where a users file is there (never the zip code).

    Raises:
        DataError: With file, row and field, for whatever is missing, unknown, malformed, repeated or out of range.
    """
    if not source.is_dir():
        raise DataError(f"{source}: not a folder; unpack the data set and give the folder that holds its ratings file")
    path = _find_ratings(source, ratings)
    layout, first_row = _recognise(path)
    table = read_table(path, layout, _EVENT_TYPES)
    user_id, item_id = text_column(table, "user_id"), text_column(table, "item_id")
    rating, timestamp = table["rating"].to_numpy(), table["timestamp"].to_numpy()
    del table  # and with it the ids as they stand in the file
    check_events(user_id, item_id, rating, timestamp, source=str(path), first_row=first_row, rating_range=_RATING_RANGE)
    name = source.resolve().name
    raw = RawDataset(
        name=name if ratings is None else f"{name} ({path.name})",
        user_id=user_id,
        item_id=item_id,
        rating=rating,
        timestamp=timestamp,
        items=read_catalogue(source, item_id.dictionary.to_pylist()),
        image_root=source,
        user_features=_read_users(source),
    )
    check_raw(raw, events_checked=True)
    logging.getLogger(__name__).info(
        "%s: %d ratings of %d users, %d movies in the catalogue",
        *(path, len(rating), len(user_id.dictionary), len(raw.items.item_id)),
    )
    return raw


def _find_ratings(source: Path, ratings: Path | None) -> Path:
    if ratings is not None:
        path = source / ratings
        if not path.is_file():
            raise DataError(f"{path}: no such ratings file; give its name in {source} or its absolute path")
        return path
    found = [match for pattern in _RATINGS_FILES if (match := find_file(source, pattern))]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{source}: several ratings files ({names}); name the one to read with --ratings")
    likely = sorted(path.name for path in source.glob("*rating*") if path.is_file())
    hint = (
        f"--ratings could name {' or '.join(likely)}"
        if likely
        else "name a ratings file of another name with --ratings"
    )
    raise DataError(f"{source}: no MovieLens recognised; looked for {', '.join(_RATINGS_FILES)}, plain or .gz; {hint}")


def _recognise(path: Path) -> tuple[Layout, int]:
    """Return the layout of a ratings file and the number of its first row of data."""
    line = first_line(path)
    if "::" in line:
        layout, count, first_row = Layout("::", names=_EVENT_FIELDS), len(line.split("::")), 1
    elif "\t" in line and ":" in line:
        layout, count, first_row = _TYPED, len(line.split("\t")), 2
    elif "\t" in line:
        layout, count, first_row = Layout("\t", names=_EVENT_FIELDS), len(line.split("\t")), 1
    elif "," in line:
        layout, count, first_row = _CSV_RATINGS, len(line.split(",")), 2
    elif line:
        raise DataError(
            f"{path} row 1: {line[:60]!r} is no MovieLens rating; fields stand between '::', tabs or commas"
        )
    else:
        raise DataError(f"{path}: the file is empty; expected {', '.join(_EVENT_FIELDS)} in each row")
    named = layout.names or column_names(path, layout)
    if count == 3 and (layout.names or "timestamp" not in named):
        raise DataError(
            f"{path} row 1: only 3 fields, the timestamp is missing; histories and each split (temporal, leave_last, "
            "cold_items) need the time of every rating, so none can be made from this file: give one with timestamps"
        )
    return layout, first_row


def _read_users(source: Path) -> dict[str, dict[str, str]]:
    forms = {"u.user": _USERS_100K, "users.dat": _USERS_1M, "*.user": _TYPED}
    found = [(path, layout) for pattern, layout in forms.items() if (path := find_file(source, pattern))]
    if not found:
        return {}
    path, layout = found[0]
    types = {"user_id": pa.string(), "gender": pa.string(), "age": pa.int64(), "occupation": pa.string()}
    table = read_table(path, layout, types, known=("zip_code",))
    user_id = table["user_id"].to_pylist()
    check_distinct(user_id, path, "user_id", first_row=1 if layout.names else 2)
    group = np.searchsorted(_AGE_GROUPS, table["age"].to_numpy(), side="right")
    ages = np.array(["", *_AGE_GROUPS.tolist()], dtype=str)[group]
    columns = {
        "gender": table["gender"].to_pylist(),
        "age": ages.tolist(),
        "occupation": table["occupation"].to_pylist(),
    }
    return {name: dict(zip(user_id, values, strict=True)) for name, values in columns.items()}
