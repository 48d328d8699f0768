"""What each rank of a training takes: bytes of its shards, its peak of memory, the time of its steps."""

import resource
import statistics
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from torchrec_em3.plan_text import to_text
from torchrec_em3.process_group import Ranks
from torchrec_em3.runlog import write_json
from torchrec_em3.sharding import ShardedModel

__all__ = ["StepTimes", "record_measurements", "resident_peak_bytes", "table_bytes"]

KEPT_STEPS = 10_000
"""Medians are over that many steps at most, the last ones."""


class _Step(NamedTuple):
    """Seconds of one step on this rank: all of it, those spent on getting batches, and of the processor."""

    whole: float
    loading: float
    processor: float


class StepTimes:
    """Times of the steps of this process, read from clocks of the host: nothing waits for them.

    A step is over when the ranks have agreed on its loss, so on CUDA a part of its backward pass may count for the next
    one; the median of whole steps is right all the same.
    """

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque(maxlen=KEPT_STEPS)

    def add(self, whole: float, loading: float, processor: float) -> None:
        """Count a step, by its seconds: all, those spent on getting batches, and of the processor."""
        self._steps.append(_Step(whole, loading, processor))

    def medians(self) -> dict[str, Any]:
        """Return `steps`, how many were measured, and medians in milliseconds, None where there were none.

        Returns:
            Of a step: `step_ms`, all of it; `loading_ms`, waiting for data; `computing_ms`, what is left: forward and
            backward pass, exchanges and optimizers; `processor_ms`, of the process.
        """
        columns = {
            "step_ms": [step.whole for step in self._steps],
            "loading_ms": [step.loading for step in self._steps],
            "computing_ms": [step.whole - step.loading for step in self._steps],
            "processor_ms": [step.processor for step in self._steps],
        }
        medians = {name: 1e3 * statistics.median(seconds) if seconds else None for name, seconds in columns.items()}
        return {"steps": len(self._steps), **medians}


def resident_peak_bytes() -> int:
    """Return the largest resident memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table_bytes(module: nn.Module) -> int:
    """Return the bytes of a sharded module's tables on this rank: weights and the state of their optimizers."""
    # TorchRec keeps the lookups of a sharded collection in a list, out of the sight of `modules`.
    lookups = [lookup for part in module.modules() for lookup in getattr(part, "_lookups", ())]
    held = 0
    for kernel in (kernel for lookup in lookups for kernel in lookup.modules()):
        if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
            states = [state for table in kernel.split_optimizer_states() or () for state in table]
            held += sum(values.nbytes for values in (*kernel.split_embedding_weights(), *states))
    return held


def record_measurements(
    run: Path, sharded: ShardedModel, ranks: Ranks, times: StepTimes, *, alone: bool = False
) -> None:
    """Write what each rank took beside its plan, to plan.json (`measured`) and plan.txt of a run.

    Args:
        run: Run folder.
        sharded: The model.
        ranks: This process among its peers.
        times: Times of its steps.
        alone: Write what rank 0 took without asking the others, who may be gone; else collective.
    """
    cuda = ranks.device.type == "cuda"
    taken = {
        "rank": ranks.rank,
        "table_bytes": table_bytes(sharded.module),
        "peak_device_bytes": torch.cuda.max_memory_allocated(ranks.device) if cuda else None,
        "peak_rss_bytes": resident_peak_bytes(),
        **times.medians(),
    }
    measured = [taken] if alone else ranks.gather(taken)
    if ranks.is_first:
        plan = {**sharded.plan.as_dict(), "measured": measured}
        write_json(run / "plan.json", plan)
        (run / "plan.txt").write_text(to_text(plan), encoding="utf-8")
