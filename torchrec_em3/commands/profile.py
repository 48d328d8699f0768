"""`em3 profile`: where the time of a training step goes, by part of the model and by operator."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import CommandParser, dump_config, parse_config
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.profiling import StepProfile, profile_steps
from torchrec_em3.runlog import configure_logging

DESCRIPTION = (
    "Train a few steps as `em3 train` would and print where their time goes. Writes RUN/profile: profile.md, the "
    "trace for Perfetto or chrome://tracing, and the config; no checkpoint."
)
HEAVIEST = 10


def main(arguments: Sequence[str]) -> None:
    """Run `em3 profile`."""
    config, values = parse_config("profile", DESCRIPTION, arguments, _add_arguments)
    for name, smallest in (("steps", 1), ("warm_up", 0)):
        if getattr(values, name) < smallest:
            raise ConfigError(f"--{name} is {getattr(values, name)}, must be at least {smallest}")
    if not config.run:
        raise ConfigError("no run folder: give --run DIR")
    folder = Path(config.run) / "profile"
    # Keeps the profiler from logging its own start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        data = open_data(config)
        sharded = build_sharded(config, data, ranks)
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        trace = folder / "trace.json.gz" if ranks.is_first else None
        found = profile_steps(config, data, sharded, ranks, steps=values.steps, warm_up=values.warm_up, trace=trace)
        if ranks.is_first:
            text = as_markdown(found, config, ranks)
            (folder / "profile.md").write_text(text, encoding="utf-8")
            (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            print(f"{text}\nwrote {folder / 'profile.md'} and {folder / 'trace.json.gz'}")


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--steps", type=int, default=10, help="Steps to profile; as many are timed without profiler.")
    parser.add_argument("--warm_up", type=int, default=3, help="Steps before those.")


def as_markdown(found: StepProfile, config: Config, ranks: Ranks) -> str:
    """Return the tables of parts and of operators."""
    lines = [
        "# Where the time of a training step goes",
        "",
        *_describe(found, config, ranks),
        "",
        *_table(["part", "forward", "backward", "both", "share", "device"], _part_rows(found), ranks),
        "",
        f"The {HEAVIEST} heaviest operators, without what they call:",
        "",
        *_table(["operator", "calls a step", "seconds", "share", "device"], _operator_rows(found), ranks),
        "",
    ]
    return "\n".join(lines)


def _describe(found: StepProfile, config: Config, ranks: Ranks) -> list[str]:
    whose = "" if ranks.world_size == 1 else f" on rank 0 of {ranks.world_size}"
    content = config.model.content
    return [
        f"{found.steps} steps of {config.loader.batch_size:,} samples{whose}, {torch.get_num_threads()} thread(s), "
        f"{ranks.device.type}; data {config.data}, content {content}"
        f"{'' if content == 'none' else f', history {config.model.history}'}.",
        f"A step takes {_per_1k(found.cpu_seconds, found):.4f} CPU seconds per 1,000 samples, and "
        f"{found.profiled_cpu_seconds / found.cpu_seconds:.2f} times as many under the profiler.",
        "",
        "Seconds are per 1,000 samples: the part's share of the training thread's time under the profiler, times the "
        "CPU seconds without it. Backward time is that of the autograd nodes which the part's forward operators made; "
        'the fused optimizer of the tables runs there. "Rest" is what belongs to no part.',
    ]


def _part_rows(found: StepProfile) -> list[list[str]]:
    rows = [
        [
            part.part,
            _cpu(part.forward, found),
            _cpu(part.backward, found),
            _cpu(part.seconds, found),
            _share(part.seconds, found),
            f"{_per_1k(part.device, found):.4f}",
        ]
        for part in found.parts
    ]
    total, device = (sum(getattr(part, name) for part in found.parts) for name in ("seconds", "device"))
    return [*rows, ["all", "", "", _cpu(total, found), _share(total, found), f"{_per_1k(device, found):.4f}"]]


def _operator_rows(found: StepProfile) -> list[list[str]]:
    return [
        [
            f"`{operator.name}`",
            f"{operator.calls / found.steps:,.0f}",
            _cpu(operator.seconds, found),
            _share(operator.seconds, found),
            f"{_per_1k(operator.device, found):.4f}",
        ]
        for operator in found.operators[:HEAVIEST]
    ]


def _table(names: list[str], rows: list[list[str]], ranks: Ranks) -> list[str]:
    """Return a Markdown table; the last column, the device's time, is left out on CPU."""
    columns = len(names) - (ranks.device.type == "cpu")
    ruler = ["---", *["---:"] * (columns - 1)]
    return ["| " + " | ".join(cells[:columns]) + " |" for cells in (names, ruler, *rows)]


def _per_1k(seconds: float, found: StepProfile) -> float:
    return seconds / found.samples * 1000


def _cpu(seconds: float, found: StepProfile) -> str:
    """Return the CPU seconds without the profiler that correspond to `seconds` under it, per 1,000 samples."""
    return f"{_per_1k(seconds / found.seconds * found.cpu_seconds, found):.4f}"


def _share(seconds: float, found: StepProfile) -> str:
    return f"{seconds / found.seconds:.1%}"
