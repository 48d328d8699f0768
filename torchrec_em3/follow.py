"""Continuous training: shards in the order in which they arrive, each measured first, then trained on once."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from torchrec_em3.batch import Batch
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_manifest import digest
from torchrec_em3.checkpoint_saver import CheckpointSaver
from torchrec_em3.config import Config
from torchrec_em3.datasets.loader import BatchStream, batch_loader
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.recent_events import RecentEvents, ShardRows
from torchrec_em3.datasets.shards import END_FILE, feature_types, list_shards, read_shard
from torchrec_em3.errors import CheckpointError, DataError, Preempted
from torchrec_em3.evaluate import predict, refresh_bank
from torchrec_em3.faults import fault_point
from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.number_format import decimals
from torchrec_em3.process_group import Ranks
from torchrec_em3.progressive import add_shard, cumulative_metrics
from torchrec_em3.runlog import RunLog
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.streams import open_stream
from torchrec_em3.trained_run import best_step
from torchrec_em3.training_steps import Progress, TrainingSteps, restored, saved_values

__all__ = ["Follower", "StreamProgress"]

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5


@dataclass
class StreamProgress(Progress):
    """Where a stream stands; `epoch` is the number of the shard, from 0, and `row` a row of it.

    Attributes:
        shard: Name of the shard that has been measured and is being trained on; empty between two shards.
        shard_sha256: Hash of that file.
        memory_sha256: Hash of the file that holds what users did before that shard; empty before the first.
        last: Name of the last shard that was trained on to its end.
        last_time: Timestamp at which it ends; -1 before the first.
        taken: Names in the folder that were trained on, as far as they were still there when the last was taken.
        totals: See `progressive.add_shard`, by task.
    """

    shard: str = ""
    shard_sha256: str = ""
    memory_sha256: str = ""
    last: str = ""
    last_time: int = -1
    taken: list[str] = field(default_factory=list)
    totals: dict[str, dict[str, float]] = field(default_factory=dict)


class Follower:
    """Trains a sharded model on the shards of a folder and leaves the last weights in the run folder."""

    def __init__(
        self,
        config: Config,
        run: Path,
        data: PreparedData,
        sharded: ShardedModel,
        ranks: Ranks,
        shards: Path,
        idle_seconds: float,
    ) -> None:
        """Prepare to train; nothing is read or written yet.

        Args:
            config: The run's options.
            run: Run folder, which exists.
            data: Prepared folder with the catalogue and the users' past.
            sharded: The model.
            ranks: This process among its peers.
            shards: Folder in which shards arrive.
            idle_seconds: Time without a new shard after which the stream counts as ended; 0 waits for ever.
        """
        self._config, self._data, self._sharded, self._ranks = config, data, sharded, ranks
        self._shards, self._idle_seconds = shards, idle_seconds
        self._memory = RecentEvents(data, config.loader.max_history)
        self._memory_folder = run / "recent_events"
        self.progress = StreamProgress()
        self.checkpoints = CheckpointFolder(run / "checkpoints", ranks)
        options = config.train
        self._saver = CheckpointSaver(
            self.checkpoints, ranks, background=options.async_checkpoints, keep=options.keep_checkpoints
        )
        self._steps = TrainingSteps(run, sharded, ranks, self._saver, options.step_timeout)
        self._log = RunLog(run, config, ranks.is_first)

    def start_from(self, run: Path) -> None:
        """Take the weights and the optimizers' state of another run's best checkpoint. Collective.

        Raises:
            CheckpointError: If it has none that is whole, or one of another model.
        """
        others = CheckpointFolder(run / "checkpoints", self._ranks)
        step = best_step(run, others)
        others.load(step, self._sharded)
        self.progress.step = self._sharded.model.step = step
        logger.info("started from %s", others.path(step))

    def fit(self, *, resume: bool = False) -> None:
        """Measure and train on shards until the end file, or until none has come for long. Collective.

        Args:
            resume: Continue from the last checkpoint, to the very same losses as an uninterrupted run.

        Raises:
            DataError: If a shard is damaged or out of order; the shards before it are trained on and saved.
            NumericError: If a loss is not finite; the step is not applied.
            Preempted: After SIGTERM, once a checkpoint is saved.
            CheckpointError: If a checkpoint cannot be written or read.
        """
        if resume:
            self._resume()
        with self._steps, self._saver:
            while name := self._next_shard():
                self._take(self._shards / name)
        self._log.close()

    def _next_shard(self) -> str:
        """Wait for a shard and return its name; empty at the end of the stream. Collective."""
        started = time.monotonic()
        while True:
            stops = self._ranks.gather(self._steps.stop_requested)
            found = ("stop", "") if stops is not None and any(stops) else ("", "")
            if stops is not None and not any(stops):
                found = self._look(time.monotonic() - started)
            kind, text = self._ranks.broadcast(found)
            if kind == "stop":
                self._stop()
            if kind == "wrong":
                raise DataError(text)
            if kind != "wait":
                return str(text)
            time.sleep(POLL_SECONDS)

    def _look(self, waited: float) -> tuple[str, str]:
        """Return what is next, as rank 0 sees the folder: "shard" and its name, "wait", "end", or "wrong" and why."""
        progress = self.progress
        if progress.shard:
            return "shard", progress.shard
        ended = (self._shards / END_FILE).exists()  # before the shards are listed: none comes after it
        try:
            names = [name for name in list_shards(self._shards) if name not in progress.taken]
        except DataError as error:
            return "wrong", str(error)
        if names and names[0] <= progress.last:
            return "wrong", (
                f"{self._shards / names[0]}: came after {progress.last}, which is trained on already; "
                "give it a later name and later events, or remove it, and --resume"
            )
        if names:
            return "shard", names[0]
        idle = 0 < self._idle_seconds <= waited
        return ("end" if ended or idle else "wait"), ""

    def _take(self, path: Path) -> None:
        """Measure a shard, unless that is done, and train on the rest of it."""
        progress = self.progress
        table = read_shard(path, self._data.tasks, feature_types(self._data))
        self._check_place(path, table)
        if progress.epoch == 0:
            self._memory.start(before=table["timestamp"][0].as_py())
        rows = self._memory.open(table)
        if not progress.shard:
            self._measure(path.name, rows)
            progress.shard, progress.shard_sha256 = path.name, digest(path).sha256
        self._train(path.name, rows)
        self._memory.add(table, rows)
        listed = self._ranks.broadcast(list_shards(self._shards) if self._ranks.is_first else None)
        progress.taken = [name for name in listed if name in progress.taken or name == path.name]
        progress.epoch, progress.row = progress.epoch + 1, 0
        progress.last, progress.last_time = path.name, table["timestamp"][-1].as_py()
        progress.shard = progress.shard_sha256 = ""
        self._write_memory()
        self._save()

    def _check_place(self, path: Path, table: pa.Table) -> None:
        progress = self.progress
        if progress.shard and digest(path).sha256 != progress.shard_sha256:
            raise DataError(
                f"{path}: is not the file of which {progress.row} rows are trained on; put that one back and --resume"
            )
        first = table["timestamp"][0].as_py()
        if first <= progress.last_time:
            raise DataError(
                f"{path} row 0: timestamp is {first}, must be later than {progress.last_time}, where {progress.last} "
                "ends; write the shard with later events and --resume"
            )

    def _measure(self, name: str, rows: ShardRows) -> None:
        """Measure a shard by the averaged weights. Collective."""
        fault_point("validate")
        progress = self.progress
        with self._sharded.average.applied():
            refresh_bank(self._sharded, self._ranks)
            predictions = predict(self._sharded, rows, "test", self._config, self._ranks)
        values: dict[str, float | None] = {}
        if predictions is not None:
            for task, found in predictions.by_task(self._data.tasks).items():
                mark = f"/{task}" if values else ""  # the main task's bear no name
                metrics = ranking_metrics(found.label, found.logit, user=found.user)
                totals = add_shard(progress.totals.get(task, {}), metrics, found.label)
                progress.totals[task] = totals
                values |= {f"{key}{mark}": metrics[key] for key in ("auc", "gauc", "ne", "logloss", "calibration", "n")}
                values |= {f"cumulative_{key}{mark}": value for key, value in cumulative_metrics(totals).items()}
                new = ranking_metrics(found.label[rows.first_seen], found.logit[rows.first_seen])
                values |= {f"auc_new_items{mark}": new["auc"], f"n_new_items{mark}": new["n"]}
        progress.totals = self._ranks.broadcast(progress.totals)
        values["samples"] = progress.samples
        self._log.scalars("progressive", step=progress.step, epoch=progress.epoch, values=values)
        if predictions is not None:
            logger.info(
                "%s  AUC %s  GAUC %s  NE %s  so far: AUC %s  NE %s  items without an event before: AUC %s (n=%d)",
                name,
                *(decimals(values[key]) for key in ("auc", "gauc", "ne", "cumulative_auc", "cumulative_ne")),
                decimals(values["auc_new_items"]),
                values["n_new_items"],
            )

    def _train(self, name: str, rows: ShardRows) -> None:
        """Train on a shard once, in its order, from the row where it stands."""
        loader, ranks = self._config.loader, self._ranks
        # Any split but train: in order, with every row, and with items in histories that had no events before.
        stream = open_stream(self._config, rows, "test", ranks)
        stream.seek(0, self.progress.row)
        batches = iter(batch_loader(stream, loader.num_workers))
        self._steps.reset()
        self._sharded.module.train()
        bar = tqdm(
            total=len(stream),
            initial=-(-self.progress.row // stream.global_batch_size),
            desc=name,
            disable=None if ranks.is_first else True,
        )
        with bar:
            while self._train_step(batches, stream):
                bar.update()

    def _train_step(self, batches: Iterator[Batch], stream: BatchStream) -> bool:
        """Train on one batch; return False at the end of the shard."""
        progress, options = self.progress, self._config.train
        if not self._steps.run(batches, progress):
            return False
        taken = min(stream.global_batch_size, stream.num_rows - progress.row)
        progress.row += taken
        progress.samples += taken
        if progress.step % options.log_every == 0:
            values: dict[str, float | None] = {**self._steps.take_averages(), "samples": progress.samples}
            self._log.scalars("train", step=progress.step, epoch=progress.epoch, values=values)
        # At its end a shard is saved anyway, with the next one's place, and a stop is looked for before that.
        if progress.row < stream.num_rows:
            if self._steps.stop_agreed:
                self._stop()
            if options.checkpoint_every and progress.step % options.checkpoint_every == 0:
                self._save()
        return True

    def _stop(self) -> None:
        self._save()
        self._saver.wait()
        raise Preempted(f"stopped by SIGTERM at step {self.progress.step}; continue with --resume")

    def _save(self) -> None:
        # None is the best: the newest stands in its place.
        saved, step = saved_values(self.progress, self._ranks), self.progress.step
        self._saver.save(step, self._sharded, saved, best_step=step)

    def _memory_path(self, shard: int) -> Path:
        return self._memory_folder / f"{shard:08d}.npz"

    def _write_memory(self) -> None:
        """Write what users did before the next shard, which checkpoints from now on need; remove what none needs."""
        progress = self.progress
        found = None
        if self._ranks.is_first:
            self._memory_folder.mkdir(exist_ok=True)
            self._memory.write(self._memory_path(progress.epoch))
            found = digest(self._memory_path(progress.epoch)).sha256
            oldest = self._memory_path(progress.epoch - self._config.train.keep_checkpoints - 1)
            for path in self._memory_folder.glob("*.npz"):
                if path.name < oldest.name:
                    path.unlink()
        progress.memory_sha256 = self._ranks.broadcast(found)

    def _resume(self) -> None:
        progress = restored(StreamProgress, self.checkpoints.load(self.checkpoints.newest_good(), self._sharded))
        if progress.epoch > 0:
            path = self._memory_path(progress.epoch)
            if not path.is_file() or digest(path).sha256 != progress.memory_sha256:
                raise CheckpointError(f"{path}: missing or damaged, and step {progress.step} needs it; restore it")
            self._memory.read(path)
        if not self._ranks.is_first:
            progress.cpu_seconds = 0.0
        self.progress = progress
        self._sharded.model.step = progress.step
        # A shard that is not begun at the checkpoint may have been measured after it, at the same step.
        self._log.rewind(progress.step, progress.epoch + (1 if progress.shard else 0))
        logger.info("resumed at step %d, shard %d row %d", progress.step, progress.epoch, progress.row)
