"""A training that a test stops: SIGTERM on one rank, before a given step."""

import os
import signal
from typing import Any

import torch.distributed as dist

from torchrec_em3 import train as train_module
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config
from torchrec_em3.errors import Preempted
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group


def fit(config: Config, resume: bool = False, stop_at: int = 0) -> Any:
    """Train; if `stop_at`, send SIGTERM to the last rank before that step."""
    original = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        if self.progress.step == stop_at - 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    train_module.Trainer._train_step = step  # type: ignore[method-assign]
    try:
        with process_group() as ranks:
            return train(resolve_parts(config), ranks, resume=resume)
    except Preempted as stopped:
        return str(stopped)
    finally:
        train_module.Trainer._train_step = original  # type: ignore[method-assign]
