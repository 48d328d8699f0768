"""The training loop: steps, validation, early stopping, checkpoints, resume."""

import logging
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from torchrec_em3.batch import Batch
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_saver import CheckpointSaver
from torchrec_em3.config import Config
from torchrec_em3.datasets.loader import batch_loader
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import NumericError, Preempted
from torchrec_em3.evaluate import evaluate_split
from torchrec_em3.faults import fault_point
from torchrec_em3.number_format import decimals
from torchrec_em3.process_group import Ranks
from torchrec_em3.run_mirror import RunMirror
from torchrec_em3.runlog import RunLog
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.streams import open_stream
from torchrec_em3.training_steps import Progress, TrainingSteps, restored, saved_values

__all__ = ["Progress", "Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a sharded model on a prepared folder and leaves the best weights in it."""

    def __init__(
        self,
        config: Config,
        run: Path,
        data: PreparedData,
        sharded: ShardedModel,
        ranks: Ranks,
        mirror: RunMirror | None = None,
    ) -> None:
        """Prepare to train; nothing is read or written yet.

        Args:
            config: The run's options.
            run: Run folder, which exists.
            data: Prepared folder.
            sharded: The model.
            ranks: This process among its peers.
            mirror: Where checkpoints are copied to, on rank 0.
        """
        self._config, self._data, self._sharded, self._ranks = config, data, sharded, ranks
        self._mirror = mirror
        self.progress = Progress()
        self.checkpoints = CheckpointFolder(run / "checkpoints", ranks)
        self._stream = open_stream(config, data, "train", ranks)
        options = config.train
        self._saver = CheckpointSaver(
            self.checkpoints,
            ranks,
            background=options.async_checkpoints,
            keep=options.keep_checkpoints,
            mirror=mirror,
        )
        self._steps = TrainingSteps(run, sharded, ranks, self._saver, options.step_timeout)
        self._log = RunLog(run, config, ranks.is_first)

    def fit(self, *, resume: bool = False) -> None:
        """Train until early stopping or the last epoch, then load the weights of the best validation.

        Args:
            resume: Continue from the last checkpoint, to the very same losses as an uninterrupted run.

        Raises:
            NumericError: If a loss is not finite; the step is not applied.
            Preempted: After SIGTERM, once a checkpoint is saved.
            CheckpointError: If a checkpoint cannot be written.
        """
        if resume:
            self._resume()
        with self._steps, self._saver:
            while self.progress.epoch < self._config.train.epochs and not self._exhausted():
                self._train_epoch()
            if self.progress.best_step < 0:
                self._validate()
        self.checkpoints.load(self.progress.best_step, self._sharded, optimizer=False)
        self._log.close()

    def _exhausted(self) -> bool:
        return self.progress.stale_validations >= self._config.train.patience

    def _train_epoch(self) -> None:
        progress, options = self.progress, self._config.train
        self._stream.seek(progress.epoch, progress.row)
        batches = iter(batch_loader(self._stream, self._config.loader.num_workers))
        self._steps.reset()
        self._sharded.module.train()
        if self._validation_is_due() and progress.validated_step != progress.step:  # stopped just before it
            self._validate()
            if self._exhausted():
                return
        bar = tqdm(
            total=len(self._stream),
            initial=progress.row // self._stream.global_batch_size,
            desc=f"epoch {progress.epoch + 1}/{options.epochs}",
            disable=None if self._ranks.is_first else True,
        )
        with bar:
            while self._train_step(batches):
                bar.update()
                if self._validation_is_due():
                    self._validate()
                    if self._exhausted():
                        return
                elif self._checkpoint_is_due():
                    self._save()
        progress.epoch, progress.row = progress.epoch + 1, 0
        if not options.evaluate_every:
            self._validate()

    def _validation_is_due(self) -> bool:
        every = self._config.train.evaluate_every
        return every > 0 and self.progress.step > 0 and self.progress.step % every == 0

    def _checkpoint_is_due(self) -> bool:
        """Validation writes the bank and saves, so no checkpoint is written where one follows at once."""
        options, progress = self._config.train, self.progress
        epoch_ends = progress.row >= len(self._stream) * self._stream.global_batch_size
        return (
            options.checkpoint_every > 0
            and progress.step % options.checkpoint_every == 0
            and (options.evaluate_every > 0 or not epoch_ends)
        )

    def _train_step(self, batches: Iterator[Batch]) -> bool:
        """Train on one batch; return False at the end of the epoch."""
        progress, options = self.progress, self._config.train
        if not self._steps.run(batches, progress):
            return False
        progress.row += self._stream.global_batch_size
        progress.samples += self._stream.global_batch_size
        if progress.step % options.log_every == 0:
            self._log_train()
        if self._steps.stop_agreed:
            self._save()
            self._saver.wait()
            raise Preempted(f"stopped by SIGTERM at step {progress.step}; continue with --resume")
        return True

    def _log_train(self) -> None:
        progress = self.progress
        values: dict[str, float | None] = {**self._steps.take_averages(), "samples": progress.samples}
        self._log.scalars("train", step=progress.step, epoch=progress.epoch, values=values)

    def _validate(self) -> None:
        """Measure the validation split by the averaged weights, note whether it is the best, save a checkpoint."""
        progress, options = self.progress, self._config.train
        fault_point("validate")
        progress.validated_step = progress.step
        with self._sharded.average.applied():
            metrics = evaluate_split(self._sharded, self._data, "validation", self._config, self._ranks)
        value = metrics[options.select_by]
        if value is None:
            raise NumericError(
                f"validation {options.select_by} is undefined (one class only); use --train.select_by logloss"
            )
        value = -value if options.select_by == "logloss" else value
        if progress.best_value is None or value > progress.best_value:
            progress.best_value, progress.best_step, progress.stale_validations = value, progress.step, 0
        else:
            progress.stale_validations += 1
        unseen = metrics["slices"]["item_frequency"]["0"]
        values = {name: metrics[name] for name in ("auc", "gauc", "ne", "logloss", "calibration")}
        values |= {"auc_unseen_items": unseen["auc"], "samples": progress.samples}
        tasks = metrics.get("tasks", {})
        values |= {f"{name}/{task}": tasks[task][name] for task in tasks for name in ("auc", "gauc", "ne", "logloss")}
        self._log.scalars("validation", step=progress.step, epoch=progress.epoch, values=values)
        logger.info(
            "step %d  validation AUC %s  GAUC %s  NE %s  items never trained on: AUC %s (n=%d)%s",
            progress.step,
            *(decimals(metrics[name]) for name in ("auc", "gauc", "ne")),
            decimals(unseen["auc"]),
            unseen["n"],
            "  best so far" if progress.stale_validations == 0 else "",
        )
        for task, found in tasks.items():
            logger.info(
                "  %s: AUC %s  GAUC %s  NE %s", task, *(decimals(found[name]) for name in ("auc", "gauc", "ne"))
            )
        self._save()

    def _save(self) -> None:
        saved = saved_values(self.progress, self._ranks)
        self._saver.save(self.progress.step, self._sharded, saved, self.progress.best_step)

    def _resume(self) -> None:
        saved = self.checkpoints.load(self.checkpoints.newest_good(), self._sharded)
        progress = restored(Progress, saved)
        self.progress = progress
        if progress.best_step not in (progress.step, -1) and not self.checkpoints.is_good(progress.best_step):
            logger.warning("the best checkpoint, step %d, is lost; the best is chosen anew", progress.best_step)
            progress.best_step, progress.best_value, progress.stale_validations = -1, None, 0
        if self._mirror is not None:
            self._mirror.send(progress.step, progress.best_step)  # it may have died before it was copied
        if not self._ranks.is_first:
            self.progress.cpu_seconds = 0.0
        self._sharded.model.step = self.progress.step
        self._log.rewind(self.progress.step)
        logger.info("resumed at step %d, epoch %d", self.progress.step, self.progress.epoch + 1)
