"""`em3 train`: plan, shard, train, evaluate the best checkpoint once on the test split."""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.config import Config
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.evaluate import evaluate_split, save_embeddings
from torchrec_em3.number_format import decimals
from torchrec_em3.parsing import CommandParser, parse_config
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.run_folder import (
    TRAINING_FILE,
    create_run,
    holds_run_of,
    is_run,
    peak_rss_bytes,
    read_training,
    write_summary,
)
from torchrec_em3.run_mirror import open_mirror, restore_run
from torchrec_em3.runlog import configure_logging, write_json
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.train import Progress, Trainer

logger = logging.getLogger(__name__)
DESCRIPTION = "Train a model on a prepared folder; under torchrun or torchx the same command trains on many processes."


def main(arguments: Sequence[str]) -> None:
    """Run `em3 train`."""
    config, values = parse_config("train", DESCRIPTION, arguments, _add_arguments)
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        resume, overwrite = how_to_start(values, config, ranks)
        train(config, ranks, resume=resume, overwrite=overwrite, evaluate=not values.skip_evaluation)


def how_to_start(values: Namespace, config: Config, ranks: Ranks) -> tuple[bool, bool]:
    """Return whether to resume the run, and whether to replace one that is there. Collective.

    What goes on is first fetched from its mirror, if this machine has nothing of it.
    """
    restarted = values.restartable or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if config.run and config.train.mirror and (restarted or values.resume):
        restore_run(config, ranks)
    if restarted:
        return ranks.broadcast(_start_again(values, config, ranks))
    return values.resume, values.overwrite


def _start_again(values: Namespace, config: Config, ranks: Ranks) -> tuple[bool, bool]:
    """Return what `how_to_start` does where torchrun, or a scheduler, starts the same command after a failure.

    It goes on, or begins anew if nothing is saved. A run with other options, or one that has ended without leaving a
    checkpoint, is none that the same command began and failed in, so it is not touched unless it was said.
    """
    run = Path(config.run)
    if not holds_run_of(run, config):
        return values.resume and is_run(run), values.overwrite
    if CheckpointFolder(run / "checkpoints", ranks).was_used():
        return True, False
    return False, values.overwrite or read_training(run) is None


def add_start_arguments(parser: CommandParser) -> None:
    """Add the arguments that `how_to_start` reads."""
    parser.add_argument("--resume", action="store_true", help="Continue the run from its last checkpoint.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a run that the folder holds already.")
    parser.add_argument(
        "--restartable",
        action="store_true",
        help="Continue the run if the folder holds a checkpoint of it, or else start it: for schedulers that start the "
        "same command again.",
    )


def _add_arguments(parser: CommandParser) -> None:
    add_start_arguments(parser)
    parser.add_argument(
        "--skip_evaluation",
        action="store_true",
        help="End after training, without reading the test split; `em3 evaluate RUN` does the rest.",
    )


def train(
    config: Config, ranks: Ranks, *, resume: bool = False, overwrite: bool = False, evaluate: bool = True
) -> dict[str, Any] | None:
    """Train one run and, where `evaluate` is set, return its summary. Collective."""
    data = open_data(config)
    sharded = build_sharded(config, data, ranks)
    mirror = open_mirror(config, ranks, resume=resume, overwrite=overwrite) if config.train.mirror else None
    run = create_run(config, data, ranks, sharded.plan, resume=resume, overwrite=overwrite)
    with mirror or contextlib.nullcontext():
        trainer = Trainer(config, run, data, sharded, ranks, mirror)
        trainer.fit(resume=resume)
        summary = _finish(trainer.progress, run, config, data, sharded, ranks, evaluate=evaluate)
        if mirror is not None:
            mirror.finish()
    return summary


def _finish(
    progress: Progress,
    run: Path,
    config: Config,
    data: PreparedData,
    sharded: ShardedModel,
    ranks: Ranks,
    *,
    evaluate: bool,
) -> dict[str, Any] | None:
    """Write what training took and, where `evaluate` is set, measure the model. Collective."""
    gathered = ranks.gather(progress.cpu_seconds)
    training = {
        "samples": progress.samples,
        "best_step": progress.best_step,
        "cpu_seconds": ranks.broadcast(sum(gathered) if gathered is not None else None),
        "peak_rss_bytes": peak_rss_bytes(ranks),
    }
    if ranks.is_first:
        write_json(run / TRAINING_FILE, training)
    if not evaluate:
        logger.info("wrote %s; next: em3 evaluate %s", run, run)
        return None
    return measure(run, config, data, sharded, ranks, training)


def measure(
    run: Path, config: Config, data: PreparedData, sharded: ShardedModel, ranks: Ranks, training: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate both held-out splits with the weights as they are, and write predictions, embeddings and summary."""
    metrics = {
        split: evaluate_split(sharded, data, split, config, ranks, save_to=run / "predictions" / f"{split}.npz")
        for split in ("validation", "test")
    }
    save_embeddings(run / "embeddings.npz", sharded, ranks, seed=0)
    summary = write_summary(run, config, data, sharded.model, ranks, training, metrics)
    unseen = metrics["test"]["slices"]["item_frequency"]["0"]
    logger.info(
        "test  AUC %s  items never trained on: AUC %s (n=%d)",
        decimals(metrics["test"]["auc"]),
        decimals(unseen["auc"]),
        unseen["n"],
    )
    for task, found in metrics["test"].get("tasks", {}).items():
        logger.info("  %s: AUC %s  NE %s", task, decimals(found["auc"]), decimals(found["ne"]))
    logger.info("wrote %s; next: em3 report %s", run / "summary.json", run)
    return summary
