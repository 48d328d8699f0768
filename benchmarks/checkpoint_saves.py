"""How long a checkpoint of a large table holds up training, saved at once and in the background.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_saves.py [--num_users 1000000] [--embedding_dim 128] [--folder DIR]

Each round trains as many steps three times: without a save, with one at once before the first step, and with one in
the background there. Times are wall-clock, medians of the rounds, with the smallest and the largest.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from synthetic import write_synthetic
from turns import WARM_UP_STEPS, Training

from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_saver import CheckpointSaver
from torchrec_em3.config import Config, LoaderConfig, ModelConfig
from torchrec_em3.process_group import process_group

MODES = {"without a save": None, "at once": False, "in the background": True}


def main(
    num_users: int = 1_000_000,
    embedding_dim: int = 128,
    batch_size: int = 2048,
    steps: int = 60,
    rounds: int = 3,
    folder: str = "",
) -> None:
    """Print seconds held up, seconds of all steps and steps per second.

    Args:
        num_users: Rows of the large table.
        embedding_dim: Its width, float32.
        batch_size: Rows of a step.
        steps: Steps of a measurement, enough for the background save to end meanwhile.
        rounds: Measurements of each kind.
        folder: Where to save; a temporary folder if not given.
    """
    with tempfile.TemporaryDirectory(dir=folder or None) as work, process_group() as ranks:
        data = write_synthetic(Path(work) / "data", num_users=num_users, num_items=1000, num_events=2 * num_users)
        config = Config(
            data=str(data),
            loader=LoaderConfig(batch_size=batch_size),
            model=ModelConfig(embedding_dim=embedding_dim, content="none"),
        )
        training = Training(config, ranks, refresh=False)
        training.run(WARM_UP_STEPS)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in MODES}
        for number in range(rounds):
            for name, background in MODES.items():
                checkpoints = CheckpointFolder(Path(work) / name, ranks)
                saver = CheckpointSaver(checkpoints, ranks, background=bool(background), keep=1)
                with saver:
                    started = time.perf_counter()
                    if background is not None:
                        saver.save(number, training.sharded, {}, best_step=-1)
                    held = time.perf_counter()
                    training.run(steps)
                    trained = time.perf_counter()
                found[name].append((held - started, trained - started, time.perf_counter() - trained))
    table_bytes = num_users * embedding_dim * 4
    print(f"table of {table_bytes / 1e6:,.0f} MB, {steps} steps of {batch_size}, {rounds} rounds\n")
    print("| checkpoint | training stands still, s | save and all steps, s | steps/s | waited for at the end, s |")
    print("|---|---:|---:|---:|---:|")
    for name, times in found.items():
        stands, total, rest = np.array(times).T
        print(f"| {name} | {_spread(stands)} | {_spread(total)} | {_spread(steps / total)} | {_spread(rest)} |")


def _spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
