"""`em3 follow`: continuous training on shards that arrive in a folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.commands.train import add_start_arguments, how_to_start
from torchrec_em3.config import Config
from torchrec_em3.errors import ConfigError
from torchrec_em3.follow import Follower
from torchrec_em3.parsing import CommandParser, parse_config
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.run_folder import TRAINING_FILE, check_data, create_run, peak_rss_bytes
from torchrec_em3.runlog import configure_logging, write_json

logger = logging.getLogger(__name__)
DESCRIPTION = (
    "Train on shards of events in the order of their names, each once and as soon as it is in the folder, and measure "
    "each before it is trained on. Ends at a file _END, after --idle seconds without a shard, or on SIGTERM (saved)."
)


def main(arguments: Sequence[str]) -> None:
    """Run `em3 follow`."""
    config, values = parse_config("follow", DESCRIPTION, arguments, _add_arguments)
    if values.idle < 0:
        raise ConfigError(f"--idle is {values.idle}, must be at least 0")
    if config.train.mirror:
        raise ConfigError(f"--train.mirror is {config.train.mirror}, but em3 follow copies nothing; leave it out")
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        resume, overwrite = how_to_start(values, config, ranks)
        start_from = Path(values.start_from) if values.start_from else None
        follow(config, ranks, Path(values.shards), start_from, idle=values.idle, resume=resume, overwrite=overwrite)


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--shards", type=str, required=True, help="Folder in which shards arrive.")
    parser.add_argument(
        "--start_from", type=str, default="", help="Run of the same model and data whose best checkpoint to start from."
    )
    parser.add_argument(
        "--idle", type=float, default=0.0, help="Seconds without a new shard after which to end; 0 waits for ever."
    )
    add_start_arguments(parser)


def follow(
    config: Config,
    ranks: Ranks,
    shards: Path,
    start_from: Path | None = None,
    *,
    idle: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train one run on the shards of a folder. Collective; see `Follower` for what it raises."""
    if start_from is not None and start_from.resolve() == Path(config.run).resolve():
        raise ConfigError(f"--start_from {start_from} is --run itself; give the new run a folder of its own")
    data = open_data(config)
    if start_from is not None:
        check_data(start_from, data)
    sharded = build_sharded(config, data, ranks)
    run = create_run(config, data, ranks, sharded.plan, resume=resume, overwrite=overwrite)
    follower = Follower(config, run, data, sharded, ranks, shards, idle)
    if start_from is not None and not resume:
        follower.start_from(start_from)
    follower.fit(resume=resume)
    progress = follower.progress
    gathered = ranks.gather(progress.cpu_seconds)
    peak = peak_rss_bytes(ranks)
    if gathered is not None:
        training = {"samples": progress.samples, "best_step": progress.step, "cpu_seconds": sum(gathered)}
        write_json(run / TRAINING_FILE, training | {"peak_rss_bytes": peak})
    logger.info("trained on %d rows of %d shards; %s", progress.samples, progress.epoch, run)
