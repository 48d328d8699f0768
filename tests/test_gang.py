"""The gang itself: results in rank order, a failing or hanging rank is told by name, and no process stays."""

import os
import time
from multiprocessing.forkserver import _forkserver
from multiprocessing.resource_tracker import _resource_tracker
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.gang import Gang, GangError, run_ranks


class Pair(NamedTuple):
    rank: int
    total: torch.Tensor


def sum_of_ranks(start: int) -> Pair:
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return Pair(int(os.environ["RANK"]), total)


def fail_each_in_its_way() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    if dist.get_rank() == 1:
        raise ValueError("planted")
    time.sleep(60)


def hang() -> None:
    time.sleep(60)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_one_gang_serves_many_calls_and_recovers_from_a_hanging_rank() -> None:
    before = children()
    with Gang(2, timeout=60) as gang:
        first = gang.run(sum_of_ranks, 10)
        assert [pair.rank for pair in first] == [0, 1]
        assert [int(pair.total) for pair in first] == [21, 21]
        pids = children()
        assert [int(pair.total) for pair in gang.run(sum_of_ranks, 20)] == [41, 41]
        assert children() == pids, "the second call must reuse the processes"
        started = time.monotonic()
        with pytest.raises(GangError, match="no answer in 2 s"):
            gang.run(hang, timeout=2)
        assert time.monotonic() - started < 10
        assert children() - before <= bookkeepers(), "a hanging rank must be killed"
        assert [int(pair.total) for pair in gang.run(sum_of_ranks, 1)] == [3, 3]
    assert children() - before <= bookkeepers(), "no rank may outlive its gang"


def test_each_failing_rank_is_told_by_name_and_leaves_nothing() -> None:
    before = children()
    with pytest.raises(GangError, match="ValueError: planted") as failure:
        run_ranks(2, fail_each_in_its_way, timeout=60)
    assert "exit code 7" in failure.value.errors[0]
    assert "planted" in failure.value.errors[1]
    assert children() - before <= bookkeepers()


def test_local_functions_are_refused() -> None:
    def local() -> None: ...

    with pytest.raises(ValueError, match="top-level"):
        run_ranks(1, local)


def bookkeepers() -> set[int]:
    """multiprocessing's own processes, which live as long as pytest."""
    pids = getattr(_resource_tracker, "_pid", None), getattr(_forkserver, "_forkserver_pid", None)
    return {pid for pid in pids if pid is not None}
