"""`em3 evaluate`: measure the best checkpoint of a run again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrec_em3.commands.train import TRAINING_FILE, measure
from torchrec_em3.parsing import CommandParser
from torchrec_em3.process_group import process_group
from torchrec_em3.run_folder import peak_rss_bytes
from torchrec_em3.runlog import configure_logging
from torchrec_em3.trained_run import open_trained_run

DESCRIPTION = "Measure the best checkpoint of a run on validation and test again, and write summary.json anew."


def main(arguments: Sequence[str]) -> None:
    """Run `em3 evaluate`."""
    parser = CommandParser("evaluate", DESCRIPTION)
    parser.add_argument("run", type=str, help="Run folder of `em3 train`.")
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    values = parser.parse(arguments)
    run = Path(values.run)
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        trained = open_trained_run(run, ranks, values.data)
        progress = trained.progress
        training = _recorded(run) or {
            "samples": progress["samples"],
            "cpu_seconds": progress["cpu_seconds"],
            "peak_rss_bytes": peak_rss_bytes(ranks),
        }
        training["best_step"] = progress["step"]
        measure(run, trained.config, trained.data, trained.sharded, ranks, training)


def _recorded(run: Path) -> dict[str, Any] | None:
    """Return what training wrote of itself, or None if it did not get to the end."""
    path = run / TRAINING_FILE
    recorded: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return recorded
