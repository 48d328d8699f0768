"""Fault points: named places where a test makes a process die, hang or run out of disk space.

The variable EM3_FAULT holds one fault, `place:rank:n:action`: `save.shard:1:2:kill` kills rank 1 the second time that
it has written its shard. The actions are kill (SIGKILL), hang, and full (the disk is full). A gang that torchrun has
started again is left alone, so that a test sees it recover. docs/reliability.md lists the places.
"""

import errno
import os
import signal
import time
from collections import Counter

from torchrec_em3.errors import ConfigError

__all__ = ["VARIABLE", "fault_point"]

VARIABLE = "EM3_FAULT"
_reached: Counter[str] = Counter()


def fault_point(place: str) -> None:
    """Do what EM3_FAULT says for this place; without it, nothing.

    Raises:
        ConfigError: If EM3_FAULT is set outside a test or cannot be read.
        OSError: If the fault is a full disk.
    """
    fault = os.environ.get(VARIABLE)
    if fault is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if "PYTEST_CURRENT_TEST" not in os.environ:
        raise ConfigError(f"{VARIABLE} is {fault}, but faults are for tests only; unset it")
    at, rank, count, action = fault.split(":")
    if (place, os.environ.get("RANK", "0")) != (at, rank):
        return
    _reached[fault] += 1
    if _reached[fault] != int(count):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        time.sleep(3600.0)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise ConfigError(f"{VARIABLE} is {fault}, its action must be kill, hang or full")
