"""What content costs: process CPU seconds per 1,000 training samples, loader included, of ID-only and EM3 in one run.

    python benchmarks/train_cost.py                                   # synthetic: Zipf(1.1) items, full histories
    python benchmarks/train_cost.py --data DATA                       # a prepared folder

Both models train in turn on the same data, A B A B, in one process, so that their ratio does not depend on what else
the machine does.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from synthetic import write_synthetic

from torchrec_em3.batch import Batch
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config, LoaderConfig, ModelConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.evaluate import refresh_bank
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.train import CheckedPipeline

WARM_UP_STEPS = 3


class _Training:
    """One model in training, a few steps at a time."""

    def __init__(self, config: Config, data: PreparedData, ranks: Ranks) -> None:
        self._config = config
        self._stream = BatchStream(
            data, "train", batch_size=config.loader.batch_size, max_history=config.loader.max_history
        )
        sharded = build_sharded(config, data, ranks)
        refresh_bank(sharded, ranks)  # as after an epoch: otherwise every target would still have to be encoded
        self._pipeline = CheckedPipeline(sharded, ranks)
        self._batches = self._endless()
        self.seconds_per_1k: list[float] = []

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._stream

    def run(self, steps: int) -> float:
        """Return the CPU seconds per 1,000 samples of `steps` steps."""
        started = time.process_time()
        for _ in range(steps):
            self._pipeline.progress(self._batches)
        return (time.process_time() - started) / (steps * self._config.loader.batch_size) * 1000


def main(
    data: str = "",
    batch_size: int = 4096,
    max_history: int = 50,
    embedding_dim: int = 64,
    hidden: tuple[int, ...] = (1024, 512, 256),
    history: str = "cache",
    encode_fraction: float = 0.25,
    rounds: int = 5,
    steps: int = 4,
    num_users: int = 5_000,
    num_items: int = 50_000,
    num_events: int = 1_500_000,
) -> None:
    """Print CPU seconds per 1,000 samples and the ratio.

    Args:
        data: Prepared folder; synthetic data of the sizes below if empty.
        batch_size: Rows per step.
        max_history: Longest history.
        embedding_dim: Width of IDs and content.
        hidden: Hidden widths of the ranker.
        history: History content of EM3.
        encode_fraction: Share of the distinct targets that a step of EM3 encodes.
        rounds: How often the two take turns.
        steps: Steps of a turn.
        num_users: Users of the synthetic data.
        num_items: Items of the synthetic data.
        num_events: Events of the synthetic data.
    """
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        path = data or str(
            write_synthetic(Path(folder) / "data", num_users=num_users, num_items=num_items, num_events=num_events)
        )
        base = Config(
            data=path,
            loader=LoaderConfig(batch_size=batch_size, max_history=max_history),
            model=ModelConfig(
                embedding_dim=embedding_dim,
                history=history,
                encode_fraction=encode_fraction,
                ranker_options={"hidden": hidden},
            ),
        )
        id_only = dataclasses.replace(base, model=dataclasses.replace(base.model, content="none"))
        trainings = {
            name: _Training(resolve_parts(config), open_data(config), ranks)
            for name, config in (("ID-only", id_only), ("EM3", base))
        }
        _describe(open_data(base), base)
        for training in trainings.values():
            training.run(WARM_UP_STEPS)
        for _ in range(rounds):
            for training in trainings.values():
                training.seconds_per_1k.append(training.run(steps))
    _print(trainings)


def _describe(data: PreparedData, config: Config) -> None:
    stream = BatchStream(data, "train", batch_size=config.loader.batch_size, max_history=config.loader.max_history)
    batch = next(iter(stream))
    targets, histories = batch.sparse["target"].values(), batch.sparse["history"].values()
    print(
        f"{data.folder.name}: batch {len(batch)}, {len(histories) / len(batch):.1f} history items a row; "
        f"{len(targets.unique())} distinct targets, {len(histories.unique())} distinct history items; "
        f"{torch.get_num_threads()} thread(s)"
    )


def _print(trainings: dict[str, _Training]) -> None:
    print(f"{'':<10}{'CPU s per 1,000':>17}{'min':>9}{'max':>9}")
    for name, training in trainings.items():
        values = training.seconds_per_1k
        print(f"{name:<10}{np.median(values):>17.4f}{min(values):>9.4f}{max(values):>9.4f}")
    first, second = (np.array(training.seconds_per_1k) for training in trainings.values())
    ratios = second / first
    print(f"EM3 / ID-only: median {np.median(ratios):.2f}, from {ratios.min():.2f} to {ratios.max():.2f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
