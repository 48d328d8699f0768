"""Saves of a training run, at once or in the background.

In the background, a save copies the state to host memory while training stands still, and a thread writes the copy by
the protocol of `checkpoint.py` while training goes on. The ranks agree on the commit in a process group of their own,
because the main one is in use by the steps. Source: ours.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard

from torchrec_em3.checkpoint import TABLE_STEPS, CheckpointFolder, training_state
from torchrec_em3.process_group import Ranks
from torchrec_em3.run_mirror import RunMirror
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.table_steps import table_steps

__all__ = ["CheckpointSaver", "copy_state"]


class CheckpointSaver:
    """Saves checkpoints one after the other and removes old ones; a context manager that ends with all of them saved.

    An exception that leaves the context is not replaced by one of the last save.
    """

    def __init__(
        self,
        checkpoints: CheckpointFolder,
        ranks: Ranks,
        *,
        background: bool,
        keep: int,
        mirror: RunMirror | None = None,
    ) -> None:
        """Prepare to save. Collective.

        Args:
            checkpoints: Where to.
            ranks: This process among its peers.
            background: Whether to write in a thread; the host memory of a rank must then hold its state twice.
            keep: How many of the newest to keep besides the best one.
            mirror: Where each one is copied to, on rank 0.
        """
        self._checkpoints, self._ranks, self._keep, self._mirror = checkpoints, ranks, keep, mirror
        self._writers: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        if background:
            self._writers = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._writing_ranks = dataclasses.replace(ranks, group=dist.new_group(backend="gloo"))

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
        finally:
            if self._writers is not None:
                self._writers.shutdown()

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed on this rank, as far as is known yet."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until what was saved is committed on all ranks.

        Raises:
            CheckpointError: If it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def save(self, step: int, sharded: ShardedModel, progress: Mapping[str, Any], best_step: int) -> None:
        """Save a checkpoint, or copy what belongs into it and return; an earlier one is waited for. Collective.

        Args:
            step: Number of optimizer steps done; a step that is already saved is left alone.
            sharded: See `CheckpointFolder.save`.
            progress: Plain values to return from `CheckpointFolder.load`.
            best_step: Step that is kept whatever its age.

        Raises:
            CheckpointError: If this checkpoint, or in the background the one before, cannot be written.
        """
        self.wait()
        progress = {**progress, TABLE_STEPS: table_steps(sharded, self._ranks)}
        if self._writers is None:
            self._checkpoints.save(step, sharded, progress)
            self._retain(step, best_step)
        else:
            state = copy_state(training_state(sharded, self._ranks))
            self._saving = self._writers.submit(partial(self._write, step, state, progress, best_step))

    def _write(self, step: int, state: Mapping[str, Any], progress: Mapping[str, Any], best_step: int) -> None:
        self._checkpoints.write(step, state, progress, self._writing_ranks)
        self._retain(step, best_step)

    def _retain(self, step: int, best_step: int) -> None:
        """Copy a checkpoint that is committed, and remove those that are not needed, nor still being copied."""
        kept = {best_step}
        if self._mirror is not None:
            self._mirror.send(step, best_step)
            kept |= self._mirror.held
        self._checkpoints.retain(kept, self._keep)


def copy_state(value: Any) -> Any:
    """Return a state in host memory that shares nothing with the model; a sharded tensor stays sharded as it is."""
    if isinstance(value, Mapping):
        return {name: copy_state(part) for name, part in value.items()}
    if isinstance(value, ShardedTensor):
        shards = [Shard(copy_state(shard.tensor), _on_host(shard.metadata)) for shard in value.local_shards()]
        metadata = value.metadata()
        everywhere = dataclasses.replace(
            metadata, shards_metadata=[_on_host(shard) for shard in metadata.shards_metadata]
        )
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, everywhere)
    if type(value) is Tensor or isinstance(value, torch.nn.Parameter):
        copied = torch.empty_like(value, device="cpu", requires_grad=False)
        return copied.copy_(value.detach())
    raise TypeError(f"a checkpoint holds tensors alone, not a {type(value).__name__}")


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    """Say that a shard is in the host memory of its rank, where torch looks for what the metadata says."""
    assert shard.placement is not None, "TorchRec places every shard"
    return ShardMetadata(shard.shard_offsets, shard.shard_sizes, f"rank:{shard.placement.rank()}/cpu")
