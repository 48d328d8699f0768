"""Training cost of DIN in this project and in other libraries, on the same rows, taking turns: CPU seconds per 1,000.

    python benchmarks/peers/compare.py                            # everything; the first call installs the peers
    python benchmarks/peers/compare.py --only fuxictr,em3 --num_users 1000000
    python benchmarks/peers/compare.py --only fuxictr --fill 0.5  # histories half filled

README.md beside this file says what is compared and how.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from environments import python_of
from jsonargparse import auto_cli
from protocol import MODES, Mode, Task, Turn, Worker
from rows import Rows, draw_rows

HERE = Path(__file__).resolve().parent
REFERENCE = "ours"
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
"""What training in this project asks of glibc for itself."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table.

    Attributes:
        title: Its name there.
        script: Worker script.
        environment: Environment of the worker, None for the project's.
        attention_hidden: Widths of its attention, None for those of the run.
        options: Options of the worker script.
    """

    title: str
    script: str
    environment: str | None = None
    attention_hidden: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)


ENTRIES = {
    REFERENCE: Entry(title="ours, ID-only", script="ours", options={"content": "none"}),
    "ours_default": Entry(
        title="ours, ID-only, default attention (32)",
        script="ours",
        attention_hidden=(32,),
        options={"content": "none"},
    ),
    "em3": Entry(
        title="ours, EM3 (cache)",
        script="ours",
        options={"history_options": {"rank": 8}, "alignment_weight": 0.01, "encode_fraction": 0.25},
    ),
    "fuxictr": Entry(
        title="FuxiCTR DIN", script="fuxictr", environment="fuxictr", options={"attention_activation": "Dice"}
    ),
    "fuxictr_relu": Entry(
        title="FuxiCTR DIN, ReLU for Dice",
        script="fuxictr",
        environment="fuxictr",
        options={"attention_activation": "ReLU"},
    ),
    "deepctr_torch": Entry(title="DeepCTR-Torch DIN", script="deepctr_torch", environment="deepctr_torch"),
    "torch_rechub": Entry(title="torch-rechub DIN", script="torch_rechub", environment="torch_rechub"),
    "recbole": Entry(title="RecBole DIN", script="recbole", environment="recbole"),
    "mmctr_din": Entry(title="MMCTR-Bench DIN", script="mmctr", environment="mmctr", options={"model": "din"}),
    "mmctr_em3": Entry(title="MMCTR-Bench EM3", script="mmctr", environment="mmctr", options={"model": "em3"}),
}


def main(
    only: str = "",
    rounds: int = 5,
    steps: int = 4,
    batches: int = 8,
    batch_size: int = 4096,
    max_history: int = 50,
    num_users: int = 100_000,
    num_items: int = 50_000,
    fill: float = 1.0,
    embedding_dim: int = 64,
    hidden: tuple[int, ...] = (1024, 512, 256),
    attention_hidden: tuple[int, ...] = (64, 32),
    kept_memory: bool = True,
    mmctr_repo: str = "",
    envs: str = "build/peers",
) -> None:
    """Print the table.

    Args:
        only: Contenders besides ours, with commas between them; all if empty.
        rounds: How often all take a turn.
        steps: Steps of a turn.
        batches: Different batches, trained on again and again.
        batch_size: Rows of a step.
        max_history: Longest history.
        num_users: Rows of the user table.
        num_items: Rows of the item table.
        fill: Mean share of the longest history that is filled, from 0.5 to 1.
        embedding_dim: Width of the ID embeddings.
        hidden: Hidden widths of the DNN.
        attention_hidden: Hidden widths of the target attention.
        kept_memory: Let the allocator of every worker keep freed memory, as this project's training does.
        mmctr_repo: Checkout of MMCTR-Bench, which is not on PyPI; left out if empty.
        envs: Folder of the peers' virtual environments.
    """
    names = _chosen(only, mmctr_repo)
    rows = draw_rows(
        num_batches=batches,
        batch_size=batch_size,
        num_users=num_users,
        num_items=num_items,
        max_history=max_history,
        fill=fill,
    )
    variables = _variables(kept_memory, mmctr_repo)
    pythons = {name: _python(ENTRIES[name].environment, Path(envs)) for name in names}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "rows.npz"
        rows.write(path)
        workers = {}
        for name in names:
            entry = ENTRIES[name]
            task = Task(
                embedding_dim=embedding_dim,
                hidden=list(hidden),
                attention_hidden=list(entry.attention_hidden or attention_hidden),
                folder=str(Path(folder) / name),
                options=entry.options,
            )
            script = HERE / f"{entry.script}_worker.py"
            workers[name] = stack.enter_context(Worker(name, pythons[name], script, path, task, variables))
        _describe(rows, workers)
        turns = _take_turns(workers, rounds, steps)
    _print(turns)


def _chosen(only: str, mmctr_repo: str) -> list[str]:
    """Return the names of the contenders, the reference first."""
    known = [name for name, entry in ENTRIES.items() if mmctr_repo or entry.environment != "mmctr"]
    asked = [name.strip() for name in only.split(",") if name.strip()] or known
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise SystemExit(
            f"--only names {', '.join(unknown)}; known: {', '.join(known)}, and with --mmctr_repo mmctr_din, mmctr_em3"
        )
    return list(dict.fromkeys([REFERENCE, *asked]))


def _python(environment: str | None, envs: Path) -> Path:
    return python_of(environment, envs) if environment else Path(sys.executable)


def _variables(kept_memory: bool, mmctr_repo: str) -> dict[str, str]:
    """Return the environment variables of the workers: one thread, and within reach what is not installed."""
    path = [str(HERE.parent), *([str(Path(mmctr_repo).resolve() / "src")] if mmctr_repo else [])]
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    return {**os.environ, **own, **(KEPT_MEMORY if kept_memory else {})}


def _take_turns(workers: Mapping[str, Worker], rounds: int, steps: int) -> dict[str, dict[Mode, list[Turn]]]:
    turns: dict[str, dict[Mode, list[Turn]]] = {name: {mode: [] for mode in MODES} for name in workers}
    for _ in range(rounds):
        for mode in MODES:
            for name, worker in workers.items():
                turns[name][mode].append(worker.turn(mode, steps))
    return turns


def _describe(rows: Rows, workers: Mapping[str, Worker]) -> None:
    batch = next(rows.batches())
    positions = batch.history[batch.history > 0]
    print(
        f"{rows.num_users:,} users, {rows.num_items:,} items; a batch: {rows.batch_size:,} rows, {len(positions):,} "
        f"history positions that hold {len(np.unique(positions)):,} distinct items, "
        f"{len(np.unique(batch.item)):,} distinct targets; one thread\n"
    )
    for script in dict.fromkeys(ENTRIES[name].script for name in workers):
        versions = next(worker.versions for name, worker in workers.items() if ENTRIES[name].script == script)
        print(f"- {script}: " + ", ".join(f"{package} {number}" for package, number in versions.items()))
    print(flush=True)


def _print(turns: Mapping[str, Mapping[Mode, list[Turn]]]) -> None:
    """Print a Markdown table; ratios are medians over the rounds of a contender's turn to the reference's."""
    print("| | " + " | ".join(f"{mode}: CPU s per 1,000 (min to max) | / ours" for mode in MODES) + " | peak GiB |")
    print("|---|" + "---|" * (2 * len(MODES) + 1))
    for name, by_mode in turns.items():
        cells = [cell for mode in MODES for cell in _cells(by_mode[mode], turns[REFERENCE][mode])]
        peak = max(turn.peak_gib for mode in MODES for turn in by_mode[mode])
        print(f"| {ENTRIES[name].title} | " + " | ".join(cells) + f" | {peak:.1f} |")


def _cells(turns: list[Turn], reference: list[Turn]) -> Iterator[str]:
    own, other = (np.array([turn.seconds_per_1k for turn in side]) for side in (turns, reference))
    yield f"{np.median(own):.3f} ({own.min():.3f} to {own.max():.3f})"
    yield f"{np.median(own / other):.2f}"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
