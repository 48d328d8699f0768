"""Requests on their way to a thread: whoever has to wait is scored together with others that wait.

Nobody is made to wait for company. While all threads are busy, requests queue; a thread that becomes free takes as
many of them at once as are scored in the time of a single larger one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.serving.scorer import Request, Scorer

__all__ = ["QueueFullError", "RequestQueue", "Scored"]

CANDIDATES_TOGETHER = 1024
"""Candidates that are scored at once, those counted that fill up shorter lists; a longer list is scored by itself.
With so many, arithmetic is what costs, and scoring more together saves nothing (benchmarks/results/serving.md)."""


class QueueFullError(Exception):
    """As many requests wait as may."""


class Scored(NamedTuple):
    """Scores of one request, and the package that they are of."""

    scorer: Scorer
    score_K: NDArray[np.float32]


class _Waiting(NamedTuple):
    request: Request
    scored: asyncio.Future[Scored]


class RequestQueue:
    """Scores requests by a few threads; to be used in one event loop."""

    def __init__(
        self,
        package: Callable[[], Scorer],
        concurrency: int,
        waiting: int,
        observe: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Create a queue.

        Args:
            package: Returns the package to score with; all requests that are scored together get the same.
            concurrency: Threads.
            waiting: Requests that may wait while all threads are busy.
            observe: Is told how many requests are scored together, each time.
        """
        self._package, self._observe = package, observe
        self._limit = waiting
        self._threads = ThreadPoolExecutor(concurrency, "score")
        self._queue: deque[_Waiting] = deque()
        self._free = concurrency
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._queue)

    async def score(self, request: Request) -> Scored:
        """Score a request, alone if a thread is free.

        Raises:
            QueueFullError: If all threads are busy and the queue is full.
            RequestError: If the package cannot score the request.
            NumericError: If a logit is not finite.
        """
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        if self._free:
            self._free -= 1
            # The loop itself holds a task by a weak reference only.
            task = asyncio.create_task(self._work([waiting]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif len(self._queue) < self._limit:
            self._queue.append(waiting)
        else:
            raise QueueFullError
        return await waiting.scored

    async def _work(self, together: list[_Waiting]) -> None:
        while together:
            self._observe(len(together))
            await self._score(together)
            together = self._next()
        # At once, not when the task is seen to have ended: whoever queued meanwhile would be left there.
        self._free += 1

    def _next(self) -> list[_Waiting]:
        """Take requests that wait, the longest waiting first."""
        together: list[_Waiting] = []
        longest = 0
        while self._queue:
            longest = max(longest, len(self._queue[0].request.candidates))
            if together and (len(together) + 1) * longest > CANDIDATES_TOGETHER:
                break
            waiting = self._queue.popleft()
            if not waiting.scored.done():  # it is, where the client has gone
                together.append(waiting)
        return together

    async def _score(self, together: Sequence[_Waiting]) -> None:
        scorer = self._package()
        requests = [waiting.request for waiting in together]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(self._threads, scorer.score, requests)
        except Exception as error:
            if len(together) > 1:
                # One that is refused must not take the others with it.
                for waiting in together:
                    await self._score([waiting])
            elif not together[0].scored.done():
                together[0].scored.set_exception(error)
            return
        for waiting, score_K in zip(together, scores, strict=True):
            if not waiting.scored.done():
                waiting.scored.set_result(Scored(scorer, score_K))
