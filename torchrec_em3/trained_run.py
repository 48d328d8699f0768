"""A trained run opened for use: its options, its data, and the model with the weights of its best checkpoint."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.config import Config
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import CheckpointError
from torchrec_em3.process_group import Ranks
from torchrec_em3.run_folder import check_data, read_run, read_training
from torchrec_em3.sharding import ShardedModel

__all__ = ["TrainedRun", "best_step", "describe_origin", "open_trained_run"]


@dataclass(frozen=True)
class TrainedRun:
    """A run that can be used.

    Attributes:
        config: Its options.
        data: The prepared folder it was trained on.
        sharded: The model in evaluation mode, with the averaged dense weights of the best checkpoint.
        progress: Where training stood at that checkpoint (see `train.Progress`).
        origin: See `describe_origin`.
    """

    config: Config
    data: PreparedData
    sharded: ShardedModel
    progress: dict[str, Any]
    origin: dict[str, str]


def open_trained_run(run: Path, ranks: Ranks, data_folder: str = "") -> TrainedRun:
    """Open a run folder and load its best checkpoint. Collective.

    Args:
        run: Run folder of `em3 train`.
        ranks: This process among its peers.
        data_folder: Prepared folder, if it has moved since training.

    Raises:
        CheckpointError: If this is no run folder, or it has no checkpoint, or a damaged one.
        DataError: If the prepared folder cannot be opened, or is not the one that the run was trained on.
    """
    config = read_run(run)
    if data_folder:
        config = dataclasses.replace(config, data=data_folder)
    data = open_data(config)
    check_data(run, data)
    checkpoints = CheckpointFolder(run / "checkpoints", ranks)
    step = best_step(run, checkpoints)
    sharded = build_sharded(config, data, ranks)
    progress = checkpoints.load(step, sharded, optimizer=False)
    sharded.model.step = step
    sharded.module.eval()
    return TrainedRun(config, data, sharded, progress, describe_origin(checkpoints, step, data))


def best_step(run: Path, checkpoints: CheckpointFolder) -> int:
    """Return the step of the best validation, or the newest good one in its place. Collective.

    A run that was stopped just before its last validation has the outcome in `training.json` alone.

    Raises:
        CheckpointError: If no checkpoint is whole.
    """
    training = read_training(run)
    return checkpoints.best_good(None if training is None else training["best_step"])


def describe_origin(checkpoints: CheckpointFolder, step: int, data: PreparedData) -> dict[str, str]:
    """Name the weights and the data that whatever is made of a run comes from: `checkpoint` and `data`.

    A checkpoint's manifest holds the hash of each of its files, so the manifest's own hash stands for all weights.
    """
    manifest = checkpoints.path(step) / "manifest.json"
    if not manifest.is_file():
        raise CheckpointError(f"{manifest} is missing, so the checkpoint is incomplete; use another one")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return {"checkpoint": f"step-{step} sha256:{digest}", "data": str(data.meta["content_hash"])}
