"""`em3 evaluate`: measure the best checkpoint of a run again."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.commands.train import measure
from torchrec_em3.config import check_seed
from torchrec_em3.missing_modalities import measure_without_modalities
from torchrec_em3.number_format import decimals
from torchrec_em3.parsing import CommandParser
from torchrec_em3.process_group import process_group
from torchrec_em3.run_folder import peak_rss_bytes, read_training
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
    check_seed("drop_seed", values.drop_seed)
    run = Path(values.run)
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        trained = open_trained_run(run, ranks, values.data)
        if values.drop_modality:
            path, found = measure_without_modalities(run, trained, ranks, values.drop_modality, values.drop_seed)
            for split in ("validation", "test"):
                logger.info("%s  AUC %s with modalities left out", split, decimals(found[split]["auc"]))
            logger.info("wrote %s", path)
            return
        progress = trained.progress
        training = read_training(run) or {
            "samples": progress["samples"],
            "cpu_seconds": progress["cpu_seconds"],
            "peak_rss_bytes": peak_rss_bytes(ranks),
        }
        training["best_step"] = progress["step"]
        measure(run, trained.config, trained.data, trained.sharded, ranks, training)
