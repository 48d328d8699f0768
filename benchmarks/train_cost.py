"""What content costs: process CPU seconds per 1,000 training samples, loader included, of ID-only and EM3 in one run.

    python benchmarks/train_cost.py                                   # synthetic: Zipf(1.1) items, full histories
    python benchmarks/train_cost.py --data DATA                       # a prepared folder

Both models train in turn on the same data, A B A B, in one process, so that their ratio does not depend on what else
the machine does.
"""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from synthetic import write_synthetic
from turns import WARM_UP_STEPS, Training, shape_of, take_turns
from whole_em3 import WHOLE_EM3

from torchrec_em3.build import open_data
from torchrec_em3.config import Config, LoaderConfig, ModelConfig
from torchrec_em3.process_group import process_group


def main(
    data: str = "",
    batch_size: int = 4096,
    max_history: int = 50,
    embedding_dim: int = 64,
    hidden: tuple[int, ...] = (1024, 512, 256),
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
                encode_fraction=encode_fraction,
                ranker_options={"hidden": hidden},
                **WHOLE_EM3,
            ),
        )
        id_only = dataclasses.replace(base, model=dataclasses.replace(base.model, content="none"))
        trainings = {"ID-only": Training(id_only, ranks), "EM3": Training(base, ranks)}
        print(f"{Path(path).name}: {shape_of(base, open_data(base))}")
        for training in trainings.values():
            training.run(WARM_UP_STEPS)
        _print(take_turns({name: partial(training.run, steps) for name, training in trainings.items()}, rounds))


def _print(seconds: dict[str, np.ndarray]) -> None:
    print(f"{'':<10}{'CPU s per 1,000':>17}{'min':>9}{'max':>9}")
    for name, values in seconds.items():
        print(f"{name:<10}{np.median(values):>17.4f}{values.min():>9.4f}{values.max():>9.4f}")
    ratios = seconds["EM3"] / seconds["ID-only"]
    print(f"EM3 / ID-only: median {np.median(ratios):.2f}, from {ratios.min():.2f} to {ratios.max():.2f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
