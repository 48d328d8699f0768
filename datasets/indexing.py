"""From raw events to catalogue rows, user rows, labels, splits and histories; arrays in, arrays out, no files.

Shape letters: E events, I item rows, U user rows (row 0, "unknown", included in both).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from torchrec_em3.datasets import splits
from torchrec_em3.datasets.event_features import dense_column, sparse_column
from torchrec_em3.datasets.ids import Ids, arrow_strings, count_codes, encode_ids, look_up
from torchrec_em3.datasets.labels import make_labels, task_thresholds
from torchrec_em3.datasets.negatives import Negatives, sample_negatives
from torchrec_em3.datasets.ordered_events import OrderedEvents
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.user_groups import user_groups
from torchrec_em3.datasets.vocabulary import index_values
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.registry import closest

__all__ = ["Histories", "IndexedDataset", "Rows", "build_histories", "index_dataset", "rank_rows"]


@dataclass(frozen=True)
class Rows:
    """Rows of a table of users or items: row 0 is "unknown", then come those with training events, then the others.

    Attributes:
        raw_id: Publisher's id of each row, str [rows]; "" in row 0.
        train_count: Training events of each row, int64 [rows]; decreasing from row 1.
        known: Number of rows with training events; they are rows 1..known.
    """

    raw_id: np.ndarray
    train_count: np.ndarray
    known: int


@dataclass(frozen=True)
class Histories:
    """Each user's events in time order, one user after the other; sampled negatives are none of them.

    Attributes:
        offsets: int64 [U + 1]; user row u has `items[offsets[u] : offsets[u + 1]]`.
        items: Catalogue rows, int32.
        end: For each row, in the order given, where the events strictly before it end in `items`, int64.
    """

    offsets: np.ndarray
    items: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class IndexedDataset:
    """A data set in numbers. Events are in global time order: by timestamp, then user row, then original order.

    A sampled negative is a row behind its positive, with that one's user, timestamp, history, features and split, and
    labels 0.

    Attributes:
        users: User rows.
        items: Catalogue rows.
        catalogue: For each item row from 1 on, the position of the item in the raw catalogue, int64 [I - 1].
        events: Columns `user`, `item`, `label`, `rating`, `timestamp`, `history_end`, `split`; `label_<task>` of each
            task but the main one; `dense_<name>` and `sparse_<name>` (rows of its vocabulary) of each feature;
            `probability` if known.
        histories: Histories of all users.
        time_cuts: First timestamp of validation and of test, or None where the split knows no global cut.
        tasks: Smallest positive rating by task, the main one first; None where the labels were given.
        vocabularies: Values of each sparse feature of the events by row; row 0 is "unknown".
    """

    users: Rows
    items: Rows
    catalogue: np.ndarray
    events: OrderedEvents
    histories: Histories
    time_cuts: tuple[int, int] | None
    tasks: dict[str, float | None]
    vocabularies: dict[str, list[str]]


def index_dataset(
    raw: RawDataset,
    *,
    split: str,
    seed: int,
    label_threshold: float | None,
    labels: Mapping[str, float] | None = None,
    negatives: int = 0,
    negative_sampling: str = "popularity",
) -> IndexedDataset:
    """Give every user and item a row, label and split the events, and lay out the histories.

    Args:
        raw: A data set that `check_raw` has passed.
        split: One of `splits.SPLITS`.
        seed: Seed of the choice of cold items and of negatives; nothing else uses chance.
        label_threshold: Smallest rating that is positive; None if ratings are 0 and 1 already.
        labels: Smallest positive rating of each of several tasks by name, in place of `label_threshold`.
        negatives: Sampled negatives for each positive of the main task.
        negative_sampling: How they are drawn, one of `negatives.NEGATIVE_SAMPLINGS`.

    Returns:
        The indexed data set; the same for the same raw data, whatever rows its catalogue has them in.

    Raises:
        ConfigError: If the split or the sampling is unknown, the split needs times and the data has none, negatives
            are wanted of data with known click probabilities, or both data and `labels` name the tasks.
        DataError: If the split cannot be made, or a rating is neither 0 nor 1 though `label_threshold` is None.
    """
    tasks = task_thresholds(raw, label_threshold, labels or {})
    label = make_labels(raw, tasks)
    user_ids, user_code = encode_ids(raw.user_id)
    item_ids, catalogue_code = encode_ids(raw.items.item_id)
    item_code = _catalogue_codes(raw.item_id, item_ids)
    split_E, cuts = _split(split, raw, user_code, len(user_ids), item_code, seed)
    _check_parts(split, split_E)
    drawn = _draw_negatives(raw, user_code, item_code, label["label"], split_E, negatives, negative_sampling, seed)
    train = split_E == splits.TRAIN
    users, user_row = rank_rows(user_ids, user_code[train])
    items, item_row = rank_rows(item_ids, item_code[train])
    catalogue = np.empty(len(item_ids), dtype=np.int64)
    catalogue[item_row[catalogue_code] - 1] = np.arange(len(item_ids))

    num_given = len(user_code)
    again = drawn.positive
    indexed = {name: index_values(values, train) for name, values in raw.sparse.items()}
    columns = {
        "user": _append(look_up(user_row.astype(np.int32), user_code), user_row[user_code[again]]),
        "item": _append(look_up(item_row.astype(np.int32), item_code), item_row[drawn.item]),
        **_measured(raw, label, again),
        **{sparse_column(name): _append(row, row[again]) for name, (_, row) in indexed.items()},
    }
    del user_code, item_code
    order = np.lexsort((columns["user"], columns["timestamp"]))
    if len(order) <= np.iinfo(np.int32).max:
        order = order.astype(np.int32)
    histories = build_histories(
        columns["user"],
        columns["item"],
        columns["timestamp"],
        num_user_rows=len(users.raw_id),
        happened=np.arange(len(order), dtype=order.dtype) < num_given,
        progress="lay out histories",
    )
    columns["history_end"] = histories.end
    columns["split"] = _append(split_E, split_E[again])
    if raw.probability is not None:
        columns["probability"] = raw.probability.astype(np.float32, copy=False)
    vocabularies = {name: values for name, (values, _) in indexed.items()}
    return IndexedDataset(users, items, catalogue, OrderedEvents(columns, order), histories, cuts, tasks, vocabularies)


def _measured(raw: RawDataset, label: Mapping[str, np.ndarray], positive: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of what was seen of the events, and of the negatives that are drawn for some of them."""
    none = np.zeros(len(positive), dtype=np.int8)
    dense = {dense_column(name): value.astype(np.float32, copy=False) for name, value in raw.dense.items()}
    return {
        **{name: _append(column, none) for name, column in label.items()},
        "rating": _append(raw.rating.astype(np.float32, copy=False), none),
        "timestamp": _append(raw.timestamp.astype(np.int64, copy=False), raw.timestamp[positive]),
        **{name: _append(column, column[positive]) for name, column in dense.items()},
    }


def _append(column: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return a column with rows behind it, in its own type; where there are none, without a copy."""
    return np.append(column, more.astype(column.dtype)) if len(more) else column


def _catalogue_codes(ids: Ids, catalogue: np.ndarray) -> np.ndarray:
    """Return where each id stands in the catalogue, int32."""
    named, code = encode_ids(ids)
    place = pc.index_in(arrow_strings(named), value_set=arrow_strings(catalogue)).to_numpy()
    return look_up(place.astype(np.int32), code)


def rank_rows(ids: np.ndarray, train_code: np.ndarray) -> tuple[Rows, np.ndarray]:
    """Order ids by decreasing training count, ties by id, behind an "unknown" in row 0.

    Args:
        ids: Distinct ids in string order, str [n].
        train_code: Position in `ids` of each training event's user or item, integers.

    Returns:
        The n + 1 rows, and the row of each entry of `ids`, int64 [n].
    """
    count = count_codes(train_code, len(ids))
    order = np.argsort(-count, kind="stable")
    row = np.empty(len(ids), dtype=np.int64)
    row[order] = np.arange(1, len(ids) + 1)
    rows = Rows(
        raw_id=np.concatenate([np.array([""], dtype=ids.dtype), ids[order]]),
        train_count=np.concatenate([[0], count[order]]),
        known=int(np.count_nonzero(count)),
    )
    return rows, row


def build_histories(
    user: np.ndarray,
    item: np.ndarray,
    timestamp: np.ndarray,
    num_user_rows: int,
    happened: np.ndarray,
    progress: str = "",
) -> Histories:
    """Lay every user's events one behind the other and mark, for each event, which of them came strictly before it.

    Events of one user with equal timestamps do not see each other.

    Args:
        user: User row of each event, integers [E].
        item: Catalogue row, integers [E].
        timestamp: Integers [E]; a user's events of one instant keep the order in which they are given.
        num_user_rows: Rows of the user table, row 0 included.
        happened: Bool [E]; false for sampled negatives, which see a history and are in none.
        progress: Name of the progress bar; none is shown if it is empty.

    Returns:
        The histories; `end` is aligned with the arguments.
    """
    count = count_codes(user, num_user_rows) - count_codes(user[~happened], num_user_rows)
    offsets = np.concatenate([[0], np.cumsum(count)])
    items = np.empty(offsets[-1], dtype=np.int32)
    end = np.empty(len(user), dtype=np.int64)
    for first_user, end_user, rows in user_groups(user, num_user_rows, progress):
        by_user = rows[np.lexsort((timestamp[rows], user[rows]))]
        starts = np.ones(len(by_user), dtype=bool)
        starts[1:] = (np.diff(user[by_user]) != 0) | (np.diff(timestamp[by_user]) != 0)
        # An instant's first event marks where the history of all of the instant's events ends.
        first = np.maximum.accumulate(np.where(starts, np.arange(len(by_user)), 0))
        kept = happened[by_user]
        end[by_user] = offsets[first_user] + (np.cumsum(kept) - kept)[first]
        items[offsets[first_user] : offsets[end_user]] = item[by_user[kept]]
    return Histories(offsets.astype(np.int64), items, end)


def _check_parts(split: str, split_E: np.ndarray) -> None:
    """Refuse a split of which a part is empty: there would be nothing to choose or to measure by."""
    counts = np.bincount(split_E, minlength=3)
    if not counts.all():
        train, validation, test = counts.tolist()
        raise DataError(
            f"--split {split} of {len(split_E)} events leaves {train} to train, {validation} to validate and {test} to "
            "test; each part needs one at least: give more events or another --split"
        )


def _split(
    name: str, raw: RawDataset, user: np.ndarray, num_users: int, item: np.ndarray, seed: int
) -> tuple[np.ndarray, tuple[int, int] | None]:
    if name not in splits.SPLITS:
        known = list(splits.SPLITS)
        raise ConfigError(f"unknown split '{name}'; known: {', '.join(known)}.{closest(name, known)}")
    if name == "temporal" and not raw.timed:
        raise ConfigError(
            f"--split temporal needs the time of every event, but data set '{raw.name}' knows only the order of each "
            "user's events; use --split leave_last or cold_items"
        )
    if name == "leave_last":
        return _leave_last(user, num_users, raw.timestamp), None
    if name == "temporal":
        return splits.temporal(raw.timestamp)
    split = splits.cold_items(item, seed)
    warm = split == splits.TRAIN
    cuts = None
    if raw.timed:
        split[warm], cuts = splits.temporal(raw.timestamp[warm])
    else:
        split[warm] = _leave_last(user[warm], num_users, raw.timestamp[warm])
    return split, cuts


def _leave_last(user: np.ndarray, num_users: int, timestamp: np.ndarray) -> np.ndarray:
    """Take each user's last two events; those of one instant keep the order in which they were given."""
    split = np.empty(len(user), dtype=np.int8)
    for _, _, rows in user_groups(user, num_users):
        order = np.empty(len(rows), dtype=np.int64)
        order[np.argsort(timestamp[rows], kind="stable")] = np.arange(len(rows))
        split[rows] = splits.leave_last(user[rows], order)
    return split


def _draw_negatives(
    raw: RawDataset,
    user: np.ndarray,
    item: np.ndarray,
    label: np.ndarray,
    split: np.ndarray,
    num: int,
    sampling: str,
    seed: int,
) -> Negatives:
    if num == 0:
        return Negatives(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    if raw.probability is not None:
        raise ConfigError(f"data set '{raw.name}' has true click probabilities, which sampled negatives lack")
    return sample_negatives(user, item, label, split, num=num, sampling=sampling, seed=seed)
