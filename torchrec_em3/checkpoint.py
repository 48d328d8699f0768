"""Checkpoints: one folder a step, complete and verified or not there at all.

A save writes into a folder with a temporary name, lists every file with its SHA-256 in `manifest.json`, and then
renames the folder to `step-N`. A load verifies the manifest before it reads anything else, because
torch.distributed.checkpoint neither notices a flipped bit nor refuses a pickle that it should not open.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from torchrec_em3.errors import CheckpointError
from torchrec_em3.process_group import Ranks
from torchrec_em3.runlog import write_json
from torchrec_em3.sharding import ShardedModel

__all__ = ["CheckpointFolder"]

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Use `folder`, which need not exist yet."""
        self.folder = folder
        self._ranks = ranks

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, in increasing order."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(step) for step in found if step.isdigit())

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    def save(self, step: int, sharded: ShardedModel, progress: Mapping[str, Any]) -> None:
        """Write a checkpoint of `step`. Collective.

        Args:
            step: Number of optimizer steps done; a step that is already saved is left alone.
            sharded: Tables, bank, dense parameters, their average and the state of both optimizers are saved.
            progress: Plain values to return from `load`: data position, early stopping and so on.

        Raises:
            CheckpointError: If it cannot be written; earlier checkpoints are untouched.
        """
        final = self.path(step)
        if self._ranks.broadcast(final.exists()):
            return
        temporary = self.folder / f".step-{step}.tmp"
        if self._ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        state = {**_tensors(sharded), **_random_state(self._ranks)}
        try:
            state_dict_saver.save(state, checkpoint_id=temporary)
        except (CheckpointException, OSError) as error:
            raise CheckpointError(
                f"cannot write checkpoint {final}: {_one_line(error)}; earlier checkpoints are kept"
            ) from error
        if self._ranks.is_first:
            write_json(temporary / "progress.json", {"step": step, "world_size": self._ranks.world_size, **progress})
            _write_manifest(temporary)
            os.rename(temporary, final)
            _sync(self.folder)
        self._ranks.barrier()

    def load(self, step: int, sharded: ShardedModel, *, optimizer: bool = True) -> dict[str, Any]:
        """Load the checkpoint of `step` into `sharded` and return its progress values. Collective.

        To go on training, everything is loaded; to use the model, the average is loaded in place of the dense weights.
        The random state of this rank is restored where the checkpoint was written by as many ranks as there are now.

        Args:
            step: Which checkpoint.
            sharded: A freshly sharded model of the same shape; the number of ranks and the sharding plan may differ.
            optimizer: Whether to go on training.

        Raises:
            CheckpointError: If the checkpoint is missing, damaged or of another model.
        """
        folder = self.path(step)
        problem = None
        if self._ranks.is_first:
            try:
                _verify_manifest(folder)
            except CheckpointError as error:
                problem = str(error)
        problem = self._ranks.broadcast(problem)
        if problem:
            raise CheckpointError(problem)
        progress: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        if optimizer:
            sharded.optimizer.optimizers[1][1].init_state()
        state = _tensors(sharded, optimizer=optimizer)
        same_ranks = progress["world_size"] == self._ranks.world_size
        random_state = _random_state(self._ranks) if same_ranks and optimizer else {}
        state.update(random_state)
        try:
            state_dict_loader.load(state, checkpoint_id=folder)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {folder} does not fit this model: {_one_line(error)}") from error
        sharded.module.load_state_dict(state["model"])
        if optimizer:
            sharded.optimizer.load_state_dict(state["optimizer"])
        else:
            sharded.average.apply()
        _restore_random_state(random_state)
        return progress

    def retain(self, keep: set[int], newest: int) -> None:
        """Remove all checkpoints but the steps in `keep` and the `newest` last ones. Call after a successful save."""
        if not self._ranks.is_first:
            return
        for step in self.steps()[:-newest]:
            if step not in keep:
                shutil.rmtree(self.path(step), ignore_errors=True)


def _tensors(sharded: ShardedModel, *, optimizer: bool = True) -> dict[str, Any]:
    state: dict[str, Any] = {"model": sharded.module.state_dict(), "average": sharded.average.state_dict()}
    if optimizer:
        state["optimizer"] = sharded.optimizer.state_dict()
    return state


def _random_state(ranks: Ranks) -> dict[str, torch.Tensor]:
    state = {f"random/{ranks.rank}/cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"random/{ranks.rank}/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    for name, value in state.items():
        if name.endswith("/cuda"):
            torch.cuda.set_rng_state(value)
        else:
            torch.set_rng_state(value)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})
    _sync(folder / "manifest.json")
    _sync(folder)


def _verify_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {folder}; is this the run folder, and did training reach a checkpoint?"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({_one_line(error)}); use another checkpoint") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; train again")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} does not match its SHA-256 in manifest.json; use another checkpoint")
