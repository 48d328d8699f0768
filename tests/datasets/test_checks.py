"""Checks of raw data: each fault is refused with the place where it is, sound data passes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.datasets.raw_data import make_raw, with_dictionaries
from torchrec_em3.datasets.checks import check_raw
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.errors import DataError


def with_event(raw: RawDataset, **changes: Any) -> RawDataset:
    """The data with other values in event 7."""
    columns = {}
    for name, value in changes.items():
        column = getattr(raw, name).astype(object if isinstance(value, str) else getattr(raw, name).dtype)
        column[7] = value
        columns[name] = column
    return replace(raw, **columns)


def with_item(raw: RawDataset, row: int, **changes: str) -> RawDataset:
    columns = {}
    for name, value in changes.items():
        column = getattr(raw.items, name).copy()
        column[row] = value
        columns[name] = column
    return replace(raw, items=replace(raw.items, **columns))


def test_sound_data_passes() -> None:
    raw = make_raw()
    check_raw(raw)
    check_raw(replace(raw, probability=np.full(len(raw.rating), 0.5, np.float32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rating": np.nan}, r"row 7: rating is nan, which is not a finite number"),
        ({"rating": np.inf}, r"row 7: rating is inf"),
        ({"timestamp": -1}, r"row 7: timestamp is -1, before 1970"),
        ({"timestamp": 10**12}, r"row 7: timestamp is 1000000000000, .*not milliseconds"),
        ({"user_id": ""}, r"row 7: user_id is empty"),
        ({"item_id": ""}, r"row 7: item_id is empty"),
        ({"item_id": "elsewhere"}, r"row 7: item_id 'elsewhere' is not in the catalogue"),
    ],
)
def test_events(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_raw(with_event(make_raw(), **changes))


def test_repeated_events_name_both_rows_and_their_number() -> None:
    raw = make_raw()
    order = np.append(np.arange(len(raw.rating)), [5, 5, 3])
    columns = {name: getattr(raw, name)[order] for name in ("user_id", "item_id", "rating", "timestamp")}
    with pytest.raises(DataError, match=rf"row {len(raw.rating)}: user_id .* repeat row 5 \(3 such rows\)"):
        check_raw(replace(raw, **columns))
    # The same pair at another time is a second rating, which is fine.
    columns["timestamp"] = columns["timestamp"].copy()
    columns["timestamp"][-3:] += [1000, 1001, 1000]
    check_raw(replace(raw, **columns))


def test_shapes_types_and_emptiness() -> None:
    raw = make_raw()
    with pytest.raises(DataError, match=r"timestamp has shape \[3\], expected"):
        check_raw(replace(raw, timestamp=raw.timestamp[:3]))
    with pytest.raises(DataError, match=r"timestamp has dtype float64, expected integer"):
        check_raw(replace(raw, timestamp=raw.timestamp.astype(float)))
    with pytest.raises(DataError, match=r"rating has dtype int64, expected floating point"):
        check_raw(replace(raw, rating=raw.rating.astype(np.int64)))
    empty = {name: getattr(raw, name)[:0] for name in ("user_id", "item_id", "rating", "timestamp")}
    with pytest.raises(DataError, match=r"data set 'random': no events"):
        check_raw(replace(raw, **empty))
    with pytest.raises(DataError, match=r"items\.title has shape \[1\], expected \[30\]"):
        check_raw(replace(raw, items=replace(raw.items, title=raw.items.title[:1])))
    with pytest.raises(DataError, match=r"probability has shape \[2\]"):
        check_raw(replace(raw, probability=np.zeros(2, np.float32)))
    wrong = np.zeros(len(raw.rating), np.float32)
    wrong[4] = np.nan
    with pytest.raises(DataError, match=r"row 4: probability is nan, outside 0\.\.1"):
        check_raw(replace(raw, probability=wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": ""}, r"empty item_id"),
        ({"image": "/etc/passwd"}, r"image '/etc/passwd' of item '.*' must be relative"),
        ({"image": "a/../../b.jpg"}, r"must be relative to image_root and inside it"),
    ],
)
def test_catalogue(changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_raw(with_item(make_raw(), 28, **changes))


def test_a_repeated_item_id_is_named() -> None:
    raw = make_raw()
    with pytest.raises(DataError, match=rf"item_id '{raw.items.item_id[3]}' stands in the catalogue 2 times"):
        check_raw(with_item(raw, 4, item_id=raw.items.item_id[3]))


@pytest.mark.parametrize("name", ["user", "history", "Has Space", "../x", "raw_id"])
def test_feature_names_that_would_collide_or_leave_the_folder(name: str) -> None:
    with pytest.raises(DataError, match="needs another name"):
        check_raw(replace(make_raw(), user_features={name: {}}))


def test_ids_may_be_a_dictionary() -> None:
    raw = make_raw()
    encoded = with_dictionaries(raw)
    check_raw(encoded)
    for name in ("user_id", "item_id"):
        ids = getattr(encoded, name)
        dictionary = ids.dictionary.to_pylist()
        empty = pa.DictionaryArray.from_arrays(ids.indices, pa.array(["", *dictionary[1:]]))
        with pytest.raises(DataError, match=f"row 0: {name} is empty"):
            check_raw(replace(raw, **{name: empty}))
        missing = pa.DictionaryArray.from_arrays(pa.array([0, None, *ids.indices.to_pylist()[2:]]), ids.dictionary)
        with pytest.raises(DataError, match=f"row 1: {name} is null"):
            check_raw(replace(raw, **{name: missing}))
        with pytest.raises(DataError, match=rf"{name} has dtype dictionary.*, expected str"):
            check_raw(replace(raw, **{name: pa.array(range(len(ids))).dictionary_encode()}))
