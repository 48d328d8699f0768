"""The events of a few users at a time: what compares events of one user needs no sort of all events.

Shape letters: E events, G events of a group, U users.
"""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from torchrec_em3.datasets.ids import count_codes

__all__ = ["repeated_rows", "user_groups"]

# Sorting this many takes some 200 MB.
_GROUP_EVENTS = 1 << 21


def user_groups(user_E: np.ndarray, num_users: int, progress: str = "") -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield all events, those of neighbouring users together; a user's events are never torn apart.

    Args:
        user_E: User of each event, integers from 0.
        num_users: All of `user_E` are below it.
        progress: Name of the progress bar; none is shown if it is empty.

    Yields:
        First user, user after the last, and the positions of their events in ascending order, int64 [G]. Memory grows
        with the events of the most active user only.
    """
    count_U = count_codes(user_E, num_users)
    group_U = (np.cumsum(count_U) - count_U) // _GROUP_EVENTS
    firsts = np.flatnonzero(np.diff(group_U, prepend=-1)).tolist()
    with tqdm(
        total=len(user_E), desc=progress, unit="event", unit_scale=True, disable=None if progress else True
    ) as bar:
        for first, end in zip(firsts, [*firsts[1:], num_users], strict=True):
            rows_G = np.flatnonzero((user_E >= first) & (user_E < end))
            yield first, end, rows_G
            bar.update(len(rows_G))


def repeated_rows(
    user_E: np.ndarray, item_E: np.ndarray, timestamp_E: np.ndarray, num_users: int, progress: str = ""
) -> np.ndarray:
    """Return the positions of events that agree with an earlier one in user, item and timestamp, ascending."""
    repeated = [np.empty(0, dtype=np.int64)]
    for _, _, rows_G in user_groups(user_E, num_users, progress):
        columns = [column[rows_G] for column in (timestamp_E, item_E, user_E)]
        order = np.lexsort(columns)
        again = np.ones(len(rows_G[1:]), dtype=bool)
        for column_G in columns:
            again &= np.diff(column_G[order]) == 0
        repeated.append(rows_G[order[1:][again]])
    return np.sort(np.concatenate(repeated))
