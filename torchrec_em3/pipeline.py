"""One training step after another, the ids of the next batch travelling while the present one is computed."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineBase

from torchrec_em3.batch import Batch
from torchrec_em3.checkpoint_saver import CheckpointSaver
from torchrec_em3.errors import CheckpointError, NumericError
from torchrec_em3.faults import fault_point
from torchrec_em3.model import Output
from torchrec_em3.pending_batch import PendingBatch
from torchrec_em3.process_group import Ranks
from torchrec_em3.sharding import ShardedModel

__all__ = ["CheckedPipeline"]


class CheckedPipeline(TrainPipelineBase[PendingBatch, Output]):
    """TorchRec's pipeline, one batch ahead, with a look at the loss before backward, where the fused optimizers write.

    What overlaps step i, on CUDA in the stream of copies: before its forward pass batch i + 1 is loaded and copied, its
    distinct items are found, and the ranks begin to tell each other how many ids will come; before its backward pass
    they begin to send them. TorchRec's TrainPipelineSparseDist does as much for modules that it finds by tracing the
    model, and it cannot trace a content path that depends on data.

    Every rank learns of a bad loss, of a request to stop or of a lost checkpoint on any rank in the same step.

    Attributes:
        stop_requested: Whether this rank is asked to stop.
        stop_agreed: Whether all ranks know that one is.
        loading_seconds: Time that the last step waited for batches.
    """

    def __init__(self, sharded: ShardedModel, ranks: Ranks, saver: CheckpointSaver | None = None) -> None:
        super().__init__(sharded.module, sharded.optimizer, ranks.device)
        self._sharded, self._ranks, self._saver = sharded, ranks, saver
        self._next: PendingBatch | None = None
        self.stop_requested = False
        self.stop_agreed = False
        self.loading_seconds = 0.0

    def progress(self, dataloader_iter: Iterator[Batch]) -> Output:
        """Train on the next batch, and take its result into the running average of the weights."""
        self.loading_seconds = 0.0
        output = super().progress(dataloader_iter)
        self._sharded.average.update(self._sharded.model.step)
        return output

    def _next_batch(self, dataloader_iter: Iterator[Batch]) -> PendingBatch | None:
        started = time.perf_counter()
        batch = super()._next_batch(dataloader_iter)
        self.loading_seconds += time.perf_counter() - started
        fault_point("batch")
        with self._stream_context(self._memcpy_stream):
            self._next = None if batch is None else self._sharded.model.ask(batch.to(self._device, non_blocking=True))
        return self._next

    def _copy_batch_to_gpu(self, cur_batch: PendingBatch) -> None:
        self._cur_batch = cur_batch  # `_next_batch` copied it, since its ids are sent from there

    def _wait_for_batch(self, cur_batch: PendingBatch) -> None:
        fault_point("exchange")
        with self._stream_context(self._memcpy_stream):
            cur_batch.receive()
        super()._wait_for_batch(cur_batch)
        fault_point("forward")

    def _backward(self, losses: Tensor) -> None:
        if self._next is not None:
            with self._stream_context(self._memcpy_stream):
                self._next.send()
        lost = self._saver is not None and self._saver.failed
        flags = losses.new_tensor([float(not self.stop_requested), float(not lost)])
        state = torch.cat([torch.isfinite(losses.detach()).float().reshape(1), flags])
        if self._ranks.world_size > 1:
            dist.all_reduce(state, op=dist.ReduceOp.MIN)
        finite, go_on, saved = state.tolist()
        self.stop_agreed = not go_on
        if not finite:
            raise NumericError(f"loss is {float(losses.detach())} on rank {self._ranks.rank}")
        if not saved:
            assert self._saver is not None, "what is not there loses nothing"
            self._saver.wait()
            raise CheckpointError("a checkpoint could not be written on another rank; earlier ones are kept")
        fault_point("backward")
        losses.backward()
        fault_point("optimizer")
