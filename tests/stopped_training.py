"""Trainings that a test stops before a given step: by an exception, or by SIGTERM on one rank."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from torchrec_em3 import train as train_module
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config
from torchrec_em3.errors import Preempted
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group


@contextmanager
def before_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Within, trainings call `act` before each step that comes after `number` steps."""
    original = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        if self.progress.step == number:
            act()
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.Trainer, "_train_step", step)
        yield


def interrupt() -> None:
    """Stop as a killed process does: nothing is saved."""
    raise KeyboardInterrupt


def terminate() -> None:
    """Send this process a SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def fit(config: Config, resume: bool = False, stop_at: int = 0) -> Any:
    """Train; if `stop_at`, send SIGTERM to the last rank before that step."""

    def terminate_last_rank() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            terminate()

    with before_step(stop_at - 1, terminate_last_rank):
        try:
            with process_group() as ranks:
                return train(resolve_parts(config), ranks, resume=resume)
        except Preempted as stopped:
            return str(stopped)
