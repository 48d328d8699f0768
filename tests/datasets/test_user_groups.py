"""Events by groups of users: each event once, no user torn apart, and repeats found as one sort would find them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.datasets import user_groups as module
from torchrec_em3.datasets.user_groups import repeated_rows, user_groups

events = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 3)), max_size=60)


@settings(deadline=None)
@given(events, st.integers(1, 70))
def test_groups_and_repeats_against_plain_loops(rows: list[tuple[int, int, int]], size: int) -> None:
    user, item, timestamp = np.array(rows, dtype=np.int32).reshape(-1, 3).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_GROUP_EVENTS", size)
        groups = list(user_groups(user, 8))
        repeated = repeated_rows(user, item, timestamp, 8)
    assert [first for first, _, _ in groups] == [0, *(end for _, end, _ in groups[:-1])]
    assert groups[-1][1] == 8
    for first, end, found in groups:
        assert found.tolist() == [row for row, one in enumerate(rows) if first <= one[0] < end]
        most = max((user == one).sum() for one in range(first, end))
        assert len(found) < size + most
    assert repeated.tolist() == [row for row, one in enumerate(rows) if one in rows[:row]]
