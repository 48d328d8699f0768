"""Requests that wait are scored together, in order, and fail alone."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, cast

import numpy as np
import pytest

from torchrec_em3.errors import DataError
from torchrec_em3.serving.request_queue import CANDIDATES_TOGETHER, QueueFullError, RequestQueue, Scored
from torchrec_em3.serving.scorer import Request, Scorer


class Gated:
    """In place of a scorer: waits for a gate, keeps what was asked together, and refuses user "bad"."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked: list[list[str]] = []

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Return the number of the user as the score of each candidate."""
        assert self.gate.wait(30)
        self.asked.append([request.user for request in requests])
        if any(request.user == "bad" for request in requests):
            raise DataError("refused")
        return [np.full(len(request.candidates), float(request.user), np.float32) for request in requests]


def ask(user: str, candidates: int = 1) -> Request:
    return Request(user, [], ["1"] * candidates)


async def started(*requests: Coroutine[Any, Any, Scored]) -> list[asyncio.Task[Scored]]:
    """Start requests in this order, so that each has its place in the queue."""
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    return tasks


def queue_of(gated: Gated, concurrency: int = 1, waiting: int = 100) -> RequestQueue:
    return RequestQueue(lambda: cast(Scorer, gated), concurrency, waiting)


def test_those_that_wait_are_scored_together() -> None:
    gated = Gated()

    async def main() -> list[Scored]:
        tasks = await started(*(queue.score(ask(str(user), 1 + user)) for user in range(5)))
        assert len(queue) == 4
        gated.gate.set()
        return await asyncio.gather(*tasks)

    queue = queue_of(gated)
    scored = asyncio.run(main())
    assert gated.asked == [["0"], ["1", "2", "3", "4"]]
    assert [result.score_K.tolist() for result in scored] == [[float(user)] * (1 + user) for user in range(5)]
    assert len(queue) == 0


def test_long_ones_are_scored_alone_and_padding_counts() -> None:
    gated = Gated()
    half = CANDIDATES_TOGETHER // 2

    async def main() -> None:
        sizes = [1, 1, half, 1, CANDIDATES_TOGETHER * 3, 1, 1]
        tasks = await started(*(queue.score(ask(str(user), size)) for user, size in enumerate(sizes)))
        gated.gate.set()
        await asyncio.gather(*tasks)

    queue = queue_of(gated)
    asyncio.run(main())
    assert gated.asked == [["0"], ["1", "2"], ["3"], ["4"], ["5", "6"]]


def test_one_that_is_refused_takes_no_other_with_it() -> None:
    gated = Gated()

    async def main() -> list[Scored | BaseException]:
        tasks = await started(*(queue.score(ask(user)) for user in ("0", "1", "bad", "3")))
        gated.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    queue = queue_of(gated)
    results = asyncio.run(main())
    assert isinstance(results[2], DataError)
    assert [result.score_K[0] for result in results if isinstance(result, Scored)] == [0, 1, 3]


def test_beyond_the_limit_they_are_turned_away_and_who_leaves_is_left_out() -> None:
    gated = Gated()

    async def main() -> None:
        tasks = await started(*(queue.score(ask(str(user))) for user in range(4)))
        with pytest.raises(QueueFullError):
            await queue.score(ask("4"))
        tasks[2].cancel()
        gated.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        await asyncio.gather(tasks[0], tasks[1], tasks[3])
        assert float((await queue.score(ask("5"))).score_K[0]) == 5, "the threads are free again"

    queue = queue_of(gated, waiting=3)
    asyncio.run(main())
    assert gated.asked == [["0"], ["1", "3"], ["5"]]


def test_a_request_that_follows_at_once_finds_a_free_thread() -> None:
    gated = Gated()
    gated.gate.set()

    async def main() -> None:
        for user in range(3):
            scored = await asyncio.wait_for(asyncio.create_task(both(str(user))), 5)
            assert float(scored.score_K[0]) == user

    async def both(user: str) -> Scored:
        await queue.score(ask(user))
        return await queue.score(ask(user))

    queue = queue_of(gated)
    asyncio.run(main())
    assert len(gated.asked) == 6


def test_threads_work_side_by_side_and_a_package_is_chosen_when_scoring_begins() -> None:
    old, new = Gated(), Gated()
    in_use = [old]

    async def main() -> list[Scored]:
        tasks = await started(*(queue.score(ask(str(user))) for user in range(3)))
        assert len(queue) == 1, "two threads have taken one each"
        await asyncio.sleep(0)
        in_use[0] = new
        old.gate.set()
        new.gate.set()
        return await asyncio.gather(*tasks)

    queue = RequestQueue(lambda: cast(Scorer, in_use[0]), 2, 100)
    scored = asyncio.run(main())
    assert [result.scorer for result in scored] == [old, old, new]
