"""Checkpoints: one folder a step, complete and verified or not there at all.

A save writes into a folder with a temporary name, lists every file with its SHA-256 in `manifest.json`, and then
renames the folder to `step-N`. A load verifies the manifest before it reads anything else, because
torch.distributed.checkpoint neither notices a flipped bit nor refuses a pickle that it should not open. A checkpoint
that does not pass is renamed to `broken-step-N` and never read again. docs/reliability.md says what happens on which
fault.
"""

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
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from torchrec_em3 import checkpoint_manifest as manifest
from torchrec_em3.checkpoint_manifest import METADATA_FILE, PROGRESS_FILE, Digest, OtherFormat
from torchrec_em3.checkpoint_metadata import MetadataReader, check_column_shards, check_metadata, saved_names
from torchrec_em3.errors import CheckpointError
from torchrec_em3.faults import fault_point
from torchrec_em3.process_group import Ranks
from torchrec_em3.runlog import write_json
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.table_steps import set_table_steps

__all__ = ["TABLE_STEPS", "CheckpointFolder", "training_state"]

logger = logging.getLogger(__name__)
TABLE_STEPS = "table_steps"
"""Name of what `table_steps` counts, among the plain values of a checkpoint."""


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Use `folder`, which need not exist yet."""
        self.folder = folder
        self._ranks = ranks
        self._good: set[int] = set()
        """Steps that this process has saved or found to be whole."""

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, in increasing order."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(step) for step in found if step.isdigit())

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    def was_used(self) -> bool:
        """Return whether a checkpoint was ever saved here, even if it has been set aside since."""
        return bool(self.steps()) or any(self.folder.glob("broken-step-*"))

    def newest_good(self) -> int:
        """Return the newest step whose checkpoint is whole, and set newer ones aside. Collective.

        Raises:
            CheckpointError: If there is none.
        """
        steps: list[int] = self._ranks.broadcast(self.steps())
        for step in reversed(steps):
            if self.is_good(step):
                return step
        raise CheckpointError(
            f"no checkpoint is left in {self.folder}: all {len(steps)} are broken; "
            "restore one from a copy or train again with --overwrite"
            if steps
            else f"no checkpoint in {self.folder}; did training reach one?"
        )

    def best_good(self, chosen: int | None = None) -> int:
        """Return the step of the best validation, or the newest good one in its place. Collective.

        Args:
            chosen: The best as training said at its end; None: as the newest checkpoint says.

        Raises:
            CheckpointError: If no checkpoint is whole.
        """
        newest = self.newest_good()
        best = int(self.progress(newest)["best_step"]) if chosen is None else chosen
        if best in (newest, -1):
            return newest
        if self.is_good(best):
            return best
        logger.warning("the best checkpoint, step %d, is lost; step %d is used in its place", best, newest)
        return newest

    def is_good(self, step: int) -> bool:
        """Return whether the checkpoint of `step` exists and is whole; a broken one is set aside. Collective."""
        if not self._ranks.broadcast(self.path(step).is_dir()):
            return False
        problem = self._problem(step)
        if problem and self._ranks.is_first:
            logger.warning("%s; %s", problem, self._set_aside(step))
        self._ranks.barrier()
        return problem is None

    def _problem(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, if anything. Collective; each rank reads its share of the files."""
        folder, problem = self.path(step), None
        try:
            names = sorted(manifest.read_manifest(folder))
            manifest.verify(folder, names[self._ranks.rank :: self._ranks.world_size])
        except OtherFormat:  # the same on each rank; nothing is broken, so nothing may be set aside
            raise
        except CheckpointError as error:
            problem = str(error)
        problems = self._ranks.gather(problem)
        if problems is not None:
            problem = next(filter(None, problems), None)
            if problem is None:
                try:
                    check_metadata(folder)
                except CheckpointError as error:
                    problem = str(error)
        problem = self._ranks.broadcast(problem)
        if problem is None:
            self._good.add(step)
        return problem

    def _set_aside(self, step: int) -> str:
        """Rename a broken checkpoint, so that it is not found again, and return what became of it."""
        broken = self.folder / f"broken-step-{step}"
        try:
            shutil.rmtree(broken, ignore_errors=True)
            os.rename(self.path(step), broken)
        except OSError as error:
            return f"the checkpoint could not be renamed ({error.strerror}) and is passed over"
        return f"the checkpoint is set aside as {broken.name}"

    def save(self, step: int, sharded: ShardedModel, progress: Mapping[str, Any]) -> None:
        """Write a checkpoint of `step`. Collective.

        Args:
            step: Number of optimizer steps done; a step that is already saved is left alone.
            sharded: Tables, bank, dense parameters, their average and the state of both optimizers are saved.
            progress: Plain values to return from `load`: data position, early stopping and so on.

        Raises:
            CheckpointError: If it cannot be written; earlier checkpoints are untouched.
        """
        self.write(step, training_state(sharded, self._ranks), progress, self._ranks)

    def write(self, step: int, state: Mapping[str, Any], progress: Mapping[str, Any], ranks: Ranks) -> None:
        """Write a checkpoint of a state that was taken before, as `save` does. Collective.

        Args:
            step: See `save`.
            state: What `training_state` returned, or a copy of it.
            progress: See `save`.
            ranks: This process among its peers, with the group in which to agree.

        Raises:
            CheckpointError: If it cannot be written; earlier checkpoints are untouched.
        """
        final = self.path(step)
        if ranks.broadcast(final.exists()):
            return
        temporary = self.folder / f".step-{step}.tmp"
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        ranks.barrier()
        values = {"step": step, "world_size": ranks.world_size, **progress}
        problem = None
        try:
            writer = _Writer(temporary)
            state_dict_saver.save(dict(state), storage_writer=writer, process_group=ranks.group)
            gathered = ranks.gather(writer.digests)
            if gathered is not None:
                _complete(temporary, values, {name: found for part in gathered for name, found in part.items()})
                os.rename(temporary, final)
                manifest.sync(self.folder)
        except (CheckpointException, OSError) as error:
            problem = _one_line(error)
        problem = ranks.broadcast(problem)
        if problem:
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot write checkpoint {final}: {problem}; earlier checkpoints are kept")
        self._good.add(step)
        fault_point("save.done")

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
        problem = self._problem(step)
        if problem:
            raise CheckpointError(f"{problem}; use another checkpoint")
        progress = self.progress(step)
        if optimizer:
            sharded.optimizer.optimizers[1][1].init_state()
        state = _tensors(sharded, optimizer=optimizer)
        if optimizer:
            check_column_shards(folder, state["optimizer"]["state"])
        same_ranks = progress["world_size"] == self._ranks.world_size
        random_state = _random_state(self._ranks) if same_ranks and optimizer else {}
        # One written on a CPU has no state of a GPU's generator.
        random_state = {name: random_state[name] for name in random_state.keys() & saved_names(folder)}
        state.update(random_state)
        try:
            state_dict_loader.load(state, storage_reader=MetadataReader(folder))
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {folder} does not fit this model: {_one_line(error)}") from error
        fault_point("load")
        sharded.module.load_state_dict(state["model"])
        if optimizer:
            sharded.optimizer.load_state_dict(state["optimizer"])
            set_table_steps(sharded, progress.get(TABLE_STEPS, 0))
        else:
            sharded.average.apply()
        _restore_random_state(random_state)
        return progress

    def progress(self, step: int) -> dict[str, Any]:
        """Return the plain values that were saved with a checkpoint."""
        values: dict[str, Any] = json.loads((self.path(step) / PROGRESS_FILE).read_text(encoding="utf-8"))
        return values

    def retain(self, keep: set[int], newest: int) -> None:
        """Remove what saves that were cut off have left, and checkpoints that are not needed.

        Args:
            keep: Steps to keep whatever their age.
            newest: How many of the last of the others to keep; the last one known to be whole is kept in any case.
        """
        if not self._ranks.is_first:
            return
        steps = self.steps()
        others = [step for step in steps if step not in keep]
        kept = {*keep, *others[-newest:], *sorted(self._good.intersection(steps))[-1:]}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


class _Writer(FileSystemWriter):
    """torch's writer of a checkpoint folder, which also reads back what this rank has written.

    What goes wrong in these methods on one rank, torch raises on all of them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self.digests: dict[str, Digest] = {}

    def write_data(self, plan: Any, planner: Any) -> Any:
        fault_point("save.start")
        written = super().write_data(plan, planner)
        for path in self._folder.glob(f"__{self.rank}_*.distcp"):
            self.digests[path.name] = manifest.digest(path)
        fault_point("save.shard")
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        fault_point("save.metadata")


def _complete(folder: Path, progress: Mapping[str, Any], digests: dict[str, Digest]) -> None:
    """Add what makes the files that all ranks have written a checkpoint."""
    write_json(folder / PROGRESS_FILE, progress)
    manifest.sync(folder / PROGRESS_FILE)
    fault_point("save.progress")
    own = {name: manifest.digest(folder / name) for name in (METADATA_FILE, PROGRESS_FILE)}
    manifest.write_manifest(folder, digests | own)
    fault_point("save.manifest")


def training_state(sharded: ShardedModel, ranks: Ranks) -> dict[str, Any]:
    """Return the tensors that a checkpoint holds, this rank's random state included; most are the model's own."""
    return {**_tensors(sharded), **_random_state(ranks)}


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
