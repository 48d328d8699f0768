"""Measurements that take turns in one process, so that their ratios do not depend on what else the machine does."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from torchrec_em3.batch import Batch
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config
from torchrec_em3.datasets.loader import batch_loader
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.evaluate import refresh_bank
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import Ranks
from torchrec_em3.streams import open_stream

__all__ = ["Shape", "Training", "cpu_seconds_per_1k", "endless_batches", "shape_of", "take_turns"]

WARM_UP_STEPS = 3


def cpu_seconds_per_1k(work: Callable[[], int]) -> float:
    """Return the CPU seconds of this process per 1,000 samples of `work`, which returns how many it went through."""
    started = time.process_time()
    samples = work()
    return (time.process_time() - started) / samples * 1000


def take_turns(works: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, np.ndarray]:
    """Measure each work once a round, A B A B; return the CPU seconds per 1,000 samples of the rounds by name."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(cpu_seconds_per_1k(work))
    return {name: np.array(values) for name, values in seconds.items()}


ALONE = Ranks(0, 1, 1, torch.device("cpu"), None)
"""One process, for what only reads."""


def endless_batches(config: Config, data: PreparedData, ranks: Ranks = ALONE) -> Iterator[Batch]:
    """Yield a rank's training batches, epoch after epoch."""
    stream = open_stream(config, data, "train", ranks)
    while True:
        yield from batch_loader(stream)


class Training:
    """One model in training with TorchRec's pipeline and the loader, a few steps at a time."""

    def __init__(self, config: Config, ranks: Ranks, *, refresh: bool = True) -> None:
        """Build the model.

        Args:
            config: Options of the run; those of the parts are filled in here.
            ranks: The process group.
            refresh: Fill the content bank as after an epoch; otherwise every target would still have to be encoded.
        """
        self.config = resolve_parts(config)
        self.data = open_data(self.config)
        self.sharded = build_sharded(self.config, self.data, ranks)
        if refresh:
            refresh_bank(self.sharded, ranks)
        self._pipeline = CheckedPipeline(self.sharded, ranks)
        self._batches = endless_batches(self.config, self.data, ranks)

    def run(self, steps: int) -> int:
        """Train `steps` steps as `em3 train` does and return their samples."""
        for _ in range(steps):
            self._pipeline.progress(self._batches)
        return steps * self.config.loader.batch_size


class Shape(NamedTuple):
    """What a batch holds."""

    rows: int
    history: float
    distinct_targets: int
    distinct_history: int

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"batch {self.rows:,}, {self.history:.1f} history items a row, {self.distinct_targets:,} distinct targets, "
            f"{self.distinct_history:,} distinct history items; {torch.get_num_threads()} thread(s)"
        )


def shape_of(config: Config, data: PreparedData) -> Shape:
    """Look at the first training batch."""
    batch = next(endless_batches(config, data))
    targets, histories = batch.sparse["target"].values(), batch.sparse["history"].values()
    return Shape(len(batch), len(histories) / len(batch), len(targets.unique()), len(histories.unique()))
