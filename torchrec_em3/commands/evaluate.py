"""`em3 evaluate`: measure the best checkpoint of a run again."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrec_em3.commands.train import TRAINING_FILE, measure
from torchrec_em3.missing_modalities import measure_without_modalities
from torchrec_em3.parsing import CommandParser
from torchrec_em3.process_group import process_group
from torchrec_em3.run_folder import peak_rss_bytes
from torchrec_em3.runlog import configure_logging
from torchrec_em3.trained_run import open_trained_run

logger = logging.getLogger(__name__)
DESCRIPTION = (
    "Measure the best checkpoint of a run on validation and test again, and write summary.json anew; or, with "
    "--drop_modality, measure it on items that lack a modality, and write robustness-SHARE-seed-SEED.json."
)


def main(arguments: Sequence[str]) -> None:
    """Run `em3 evaluate`."""
    parser = CommandParser("evaluate", DESCRIPTION)
    parser.add_argument("run", type=str, help="Run folder of `em3 train`.")
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    parser.add_argument(
        "--drop_modality", type=float, default=0.0, help="Chance of an item to lose one of its modalities; 0: no item."
    )
    parser.add_argument("--drop_seed", type=int, default=0, help="Seed of that draw.")
    values = parser.parse(arguments)
    run = Path(values.run)
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        trained = open_trained_run(run, ranks, values.data)
        if values.drop_modality:
            path, found = measure_without_modalities(run, trained, ranks, values.drop_modality, values.drop_seed)
            for split in ("validation", "test"):
                logger.info("%s  AUC %.4f with modalities left out", split, found[split]["auc"])
            logger.info("wrote %s", path)
            return
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
