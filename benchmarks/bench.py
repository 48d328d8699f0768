"""A line of the table of speeds, and what its rows share: sizes, synthetic data, models, turns."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from synthetic import write_synthetic
from turns import WARM_UP_STEPS, Training, take_turns
from whole_em3 import WHOLE_EM3

from torchrec_em3.config import Config, LoaderConfig, ModelConfig
from torchrec_em3.process_group import Ranks

__all__ = ["FULL", "HALF", "HEADER", "Bench", "Row", "Sizes", "costs"]

FULL, HALF = 10.0, 1.25
"""Events a user has, in lengths of history: with a fifth of them kept from training, rows see 94 % and 50 % of it."""
HEADER = "| row | ratio | goal | median | rounds | met | measured on |\n|" + "---|" * 7


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a goal such as "<= 1.3", the ratio of each round, and what it was measured on."""

    number: int
    what: str
    goal: str
    ratios: np.ndarray
    measured: str

    def __str__(self) -> str:
        """Return the line."""
        value = float(np.median(self.ratios))
        relation, limit = self.goal.split()
        met = value <= float(limit) if relation == "<=" else value >= float(limit)
        spread = f"{self.ratios.min():.2f} to {self.ratios.max():.2f}"
        cells = (self.number, self.what, self.goal, f"**{value:.2f}**", spread, "yes" if met else "no", self.measured)
        return f"| {' | '.join(map(str, cells))} |"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    data: str = ""
    """Prepared folder to measure on as well."""
    batch_size: int = 4096
    """Rows per step."""
    embedding_dim: int = 64
    """Width of IDs and content."""
    hidden: tuple[int, ...] = (1024, 512, 256)
    """Hidden widths of the ranker."""
    encode_fraction: float = 0.25
    """Share of the distinct targets that a step of EM3 encodes."""
    histories: tuple[int, ...] = (50, 200, 1000)
    """Longest histories of rows 1 and 3; the others take the first."""
    rounds: int = 5
    """How often those compared take turns."""
    steps: int = 3
    """Training steps of a turn."""
    num_items: int = 50_000
    """Items of the synthetic data."""
    num_events: int = 1_500_000
    """Events of the synthetic data."""
    num_users: int = 1_000_000
    """Users of row 2."""

    def __str__(self) -> str:
        """Return them in words."""
        return (
            f"Batch {self.batch_size:,}, D {self.embedding_dim}, MLP {'-'.join(map(str, self.hidden))}, "
            f"{self.num_items:,} items Zipf(1.1), a share of {self.encode_fraction:g} of the targets encoded; "
            f"{self.rounds} rounds of {self.steps} steps, {torch.get_num_threads()} thread(s) of {os.cpu_count()} "
            f"{torch.backends.cpu.get_cpu_capability()} cores, torch {torch.__version__}."
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """The sizes, and where the synthetic data are kept between rows."""

    sizes: Sizes
    folder: Path
    ranks: Ranks

    def synthetic(self, num_users: int, num_events: int) -> Path:
        """Return the prepared folder of these sizes; made at the first call, with one copy of the tokens for all."""
        path = self.folder / f"{num_users}-{num_events}"
        if not path.is_dir():
            others = sorted(self.folder.iterdir())
            write_synthetic(
                path,
                num_users=num_users,
                num_items=self.sizes.num_items,
                num_events=num_events,
                tokens_of=others[0] if others else None,
            )
        return path

    def filled(self, history: int, lengths: float) -> Path:
        """Return synthetic data whose users have `lengths` times `history` events."""
        return self.synthetic(int(self.sizes.num_events / (lengths * history)), self.sizes.num_events)

    def sources(self) -> Iterator[tuple[str, Path]]:
        """Yield name and folder of the data for rows with the shortest history: synthetic, and the one given."""
        yield "synthetic", self.filled(self.sizes.histories[0], FULL)
        if self.sizes.data:
            yield Path(self.sizes.data).name, Path(self.sizes.data)

    def models(self, path: Path, history: int) -> dict[str, Config]:
        """Return the configs of ID-only and EM3 on some data."""
        em3 = Config(
            data=str(path),
            loader=LoaderConfig(batch_size=self.sizes.batch_size, max_history=history),
            model=ModelConfig(
                embedding_dim=self.sizes.embedding_dim,
                **WHOLE_EM3,
                encode_fraction=self.sizes.encode_fraction,
                ranker_options={"hidden": self.sizes.hidden},
            ),
        )
        return {"ID-only": dataclasses.replace(em3, model=dataclasses.replace(em3.model, content="none")), "EM3": em3}

    def train(self, configs: Mapping[str, Config]) -> dict[str, np.ndarray]:
        """Train several models in turns; return their CPU seconds per 1,000 samples, round by round."""
        trainings = {name: Training(config, self.ranks) for name, config in configs.items()}
        for training in trainings.values():
            training.run(WARM_UP_STEPS)
        return take_turns(
            {name: partial(training.run, self.sizes.steps) for name, training in trainings.items()}, self.sizes.rounds
        )


def costs(times: Mapping[str, np.ndarray]) -> str:
    """Return the medians in words."""
    return ", ".join(f"{name} {np.median(values):.4f}" for name, values in times.items()) + " CPU s per 1,000 samples"
