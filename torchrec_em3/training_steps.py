"""Steps of training one after the other: watched, counted, stopped by SIGTERM once the step is done."""

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor, zeros_like

from torchrec_em3.batch import Batch
from torchrec_em3.checkpoint_saver import CheckpointSaver
from torchrec_em3.errors import EM3Error, NumericError, Preempted
from torchrec_em3.faults import fault_point
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import Ranks
from torchrec_em3.rank_measurements import StepTimes, record_measurements
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.watchdog import StepWatchdog

__all__ = ["Progress", "TrainingSteps", "restored", "saved_values"]

Kind = TypeVar("Kind", bound="Progress")


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint.

    Attributes:
        epoch: Current epoch, from 0.
        row: Rows of the epoch's order that have been trained on, over all ranks.
        step: Optimizer steps done.
        samples: Rows trained on, over all ranks and epochs.
        cpu_seconds: Processor time of training steps, loading included, over all ranks.
        best_step: Step of the best validation; -1 before the first.
        best_value: Its metric, larger is better; None before the first.
        stale_validations: Validations since then.
        validated_step: Step of the last validation; -1 before the first.
    """

    epoch: int = 0
    row: int = 0
    step: int = 0
    samples: int = 0
    cpu_seconds: float = 0.0
    best_step: int = -1
    best_value: float | None = None
    stale_validations: int = 0
    validated_step: int = -1


class TrainingSteps:
    """The steps of a run; while it is entered, SIGTERM asks all ranks to stop instead of killing the process."""

    def __init__(
        self, run: Path, sharded: ShardedModel, ranks: Ranks, saver: CheckpointSaver, step_timeout: float
    ) -> None:
        """Prepare to train.

        Args:
            run: Run folder, whose plan gets what the ranks took.
            sharded: The model.
            ranks: This process among its peers.
            saver: The run's saves, whose failure ends the steps of all ranks.
            step_timeout: Seconds after which a step that has not ended ends the job; 0 waits for ever.
        """
        self._pipeline = CheckedPipeline(sharded, ranks, saver)
        self._watchdog = StepWatchdog(step_timeout, ranks.rank)
        self._run, self._sharded, self._ranks = run, sharded, ranks
        self._times = StepTimes()
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._previous: Any = None

    def __enter__(self) -> "TrainingSteps":
        self._previous = signal.signal(signal.SIGTERM, self._request)
        self._watchdog.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._record(kind)
        self._watchdog.__exit__()
        signal.signal(signal.SIGTERM, self._previous)

    def _record(self, kind: type[BaseException] | None) -> None:
        """Write what the ranks took; after an error that may be one rank's alone, rank 0 does not ask the others."""
        measured = self._run, self._sharded, self._ranks, self._times
        if kind is None or issubclass(kind, Preempted):
            record_measurements(*measured)
        elif issubclass(kind, EM3Error | KeyboardInterrupt):
            with contextlib.suppress(OSError):  # what is to be told is the error that ended the training
                record_measurements(*measured, alone=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._pipeline.stop_requested = True

    @property
    def stop_requested(self) -> bool:
        """Whether this rank has received SIGTERM."""
        return self._pipeline.stop_requested

    @property
    def stop_agreed(self) -> bool:
        """Whether all ranks know, since the last step, that one of them has received SIGTERM."""
        return self._pipeline.stop_agreed

    def reset(self) -> None:
        """Forget the batch that was loaded ahead; to be called before batches of another iterator."""
        self._pipeline.reset()

    def run(self, batches: Iterator[Batch], progress: Progress) -> bool:
        """Train on the next batch and count the step; return False if there is none. Collective.

        Raises:
            NumericError: If a loss is not finite; the step is not applied.
            CheckpointError: If a checkpoint could not be written in the background.
        """
        started, processor_started = time.perf_counter(), time.process_time()
        try:
            with self._watchdog.step():
                fault_point("step")
                output = self._pipeline.progress(batches)
        except StopIteration:
            return False
        except NumericError as error:
            raise NumericError(
                f"{error} at step {progress.step + 1}; the step was not applied. Lower --train.learning_rate or "
                "--embeddings.learning_rate, or continue from the last checkpoint with --resume"
            ) from error
        progress.step += 1
        processor = time.process_time() - processor_started
        progress.cpu_seconds += processor
        self._times.add(time.perf_counter() - started, self._pipeline.loading_seconds, processor)
        self._count += 1
        for name, value in output.metrics.items():
            # Kept as tensors, so that no step waits for them.
            self._sums[name] = self._sums.get(name, zeros_like(value)) + value
        return True

    def take_averages(self) -> dict[str, float]:
        """Return the means of the metrics of the steps since the last call; on rank 0, over all ranks. Collective."""
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        gathered = self._ranks.gather(means)
        if gathered is None:
            return means
        return {name: sum(part[name] for part in gathered) / len(gathered) for name in means}


def saved_values(progress: Progress, ranks: Ranks) -> dict[str, Any]:
    """Return the values of `progress` that a checkpoint holds, with the processor time of all ranks. Collective."""
    gathered = ranks.gather(progress.cpu_seconds)
    return asdict(progress) | {"cpu_seconds": sum(gathered) if gathered is not None else 0.0}


def restored(kind: type[Kind], saved: Mapping[str, Any]) -> Kind:
    """Return the progress that a checkpoint holds.

    The manifest vouches for the values, so one that is not there is one that earlier versions did not have.
    """
    return kind(**{name: saved.get(name, default) for name, default in asdict(kind()).items()})
