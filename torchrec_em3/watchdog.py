"""A watchdog for training steps: a job that hangs says where, and ends."""

import faulthandler
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXIT_CODE", "StepWatchdog"]

EXIT_CODE = 7
"""Exit code of a process whose step did not end in time."""
GRACE_SECONDS = 5.0
"""How long a process stays after it has printed its stacks: one that leaves takes the others with it, and they are
about to print theirs."""


class StepWatchdog:
    """Ends this process when a step takes too long; a context manager, on every rank.

    When one rank hangs, the others wait for it in a collective, so that their steps run out of time as well. The thread
    that watches needs the interpreter: code that hangs without releasing it is seen by the other ranks alone.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        """Watch steps from `__enter__` on.

        Args:
            seconds: How long a step may take; 0 watches nothing.
            rank: Number of this process, for the message.
        """
        self._seconds, self._rank = seconds, rank
        self._deadline = math.inf
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step watchdog", daemon=True)

    def __enter__(self) -> "StepWatchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds > 0:
            self._closed.set()
            self._thread.join()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch what is done meanwhile."""
        self._deadline = time.monotonic() + self._seconds
        try:
            yield
        finally:
            self._deadline = math.inf

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if self._is_late():
                self._end()

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _end(self) -> None:
        # One write: ranks that time out together would otherwise mix the pieces of their stacks in the same log.
        sys.stderr.write(
            f"em3: a step took more than --train.step_timeout {self._seconds:g} s on rank {self._rank}; "
            f"its threads are below. Continue with --resume, with a longer time if the step was only slow\n{_stacks()}"
        )
        sys.stderr.flush()
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_CODE)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
