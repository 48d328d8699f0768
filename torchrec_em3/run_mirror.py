"""A copy of a run at an fsspec URL: each checkpoint in the background, by the protocol of `checkpoint.py`.

A checkpoint is there once its manifest is, which is put last and removed first; a machine that has nothing of the run
fetches the newest one whose files are what its manifest says. Training never waits for a store and never ends because
of one: a checkpoint that could not be put is one warning, and the next one is tried. Source: ours.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from torchrec_em3 import checkpoint_manifest as manifest
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_manifest import MANIFEST_FILE, PROGRESS_FILE, OtherFormat
from torchrec_em3.config import Config
from torchrec_em3.datasets.object_store import open_store, store_errors
from torchrec_em3.errors import CheckpointError, ConfigError, EM3Error
from torchrec_em3.process_group import Ranks
from torchrec_em3.run_folder import CONFIG_FILE

__all__ = ["RunMirror", "open_mirror", "restore_run"]

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
Found = TypeVar("Found")


class RunMirror:
    """The copy of one run, kept by rank 0; a context manager that ends when nothing is being put any more."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Look at what the URL holds; see `open_mirror`."""
        self._url, self._run, self._keep = config.train.mirror, Path(config.run), config.train.keep_checkpoints
        self._store = _Store(self._url)
        self._newest, self._best, self._problem = -1, -1, ""
        self._jobs: list[tuple[set[int], Future[None]]] = []
        self._put: dict[str, tuple[int, int]] = {}
        """Size and time of the files besides checkpoints, as they were put."""
        if not resume:
            self._start_anew(overwrite)
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="mirror")

    def __enter__(self) -> "RunMirror":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._uploads.shutdown()
        if kind is not None and self._problem:
            logger.warning("%s lacks the last checkpoint, step %d; it is in %s", self._url, self._newest, self._run)

    @property
    def held(self) -> set[int]:
        """Steps whose checkpoints are still read, so they must not be removed yet."""
        self._jobs = [(steps, job) for steps, job in self._jobs if not job.done()]
        return {step for steps, _ in self._jobs for step in steps}

    def send(self, step: int, best_step: int) -> None:
        """Put the checkpoint of a step, and the best one if it is not there, in the background.

        Args:
            step: The newest checkpoint; one before it that waits for its turn is passed over.
            best_step: The best one, or -1.
        """
        self._newest, self._best = step, best_step
        self._jobs.append(({step, best_step}, self._uploads.submit(self._upload, step, best_step)))

    def finish(self) -> None:
        """Wait, try again what is not there, and put the files besides checkpoints as they are at the end of a run.

        Raises:
            CheckpointError: If the copy is not complete; the run folder itself is.
        """
        for _, job in self._jobs:
            job.result()
        if self._problem:
            self._upload(self._newest, self._best)
        try:
            if not self._problem:
                self._put_run_files()
        except EM3Error as error:
            self._problem = str(error)
        if self._problem:
            raise CheckpointError(
                f"the run is complete in {self._run}, but its copy is not: {self._problem}; copy it, or run the same "
                "command with --resume"
            )
        logger.info("copied %s to %s", self._run, self._url)

    def _start_anew(self, overwrite: bool) -> None:
        if not self._store.holds_run():
            return
        if not overwrite:
            raise ConfigError(
                f"--train.mirror {self._url} already holds a run; choose another URL, or add --resume or --overwrite"
            )
        self._store.clear()

    def _upload(self, step: int, best_step: int) -> None:
        if step != self._newest:
            return
        folder, self._problem = self._run / CHECKPOINTS, ""
        try:
            self._put_run_files()
            with store_errors(self._url, CheckpointError):
                for number in sorted({best_step, step} - {-1}):
                    self._store.put(number, folder / f"step-{number}")
                others = [number for number in self._store.steps() if number != best_step]
                for old in self._store.found().keys() - {best_step, *others[-self._keep :]}:
                    self._store.remove(old)
        except EM3Error as error:
            self._problem = str(error)
            logger.warning(
                "the copy of checkpoint step %d failed: %s; training goes on and the next one is tried", step, error
            )

    def _put_run_files(self) -> None:
        """Put the files besides checkpoints that have changed since."""
        with store_errors(self._url, CheckpointError):
            parts = [path for path in self._run.iterdir() if path.name != CHECKPOINTS]
            for path in [file for part in parts for file in ([part] if part.is_file() else part.rglob("*"))]:
                if path.name.startswith(".") or not path.is_file():
                    continue
                name, state = path.relative_to(self._run).as_posix(), path.stat()
                found = (state.st_size, state.st_mtime_ns)
                if self._put.get(name) != found:
                    self._store.put_file(path, name)
                    self._put[name] = found


def open_mirror(config: Config, ranks: Ranks, *, resume: bool, overwrite: bool) -> RunMirror | None:
    """Return the mirror of a run, on rank 0. Collective.

    Args:
        config: Options of the run, with the URL.
        ranks: This process among its peers.
        resume: Whether the run goes on, so that it may be there.
        overwrite: Whether another run there may be removed.

    Raises:
        ConfigError: If nothing installed can write there, or there is another run.
        CheckpointError: If the store cannot be reached.
    """
    return _on_first(ranks, config.train.mirror, lambda: RunMirror(config, resume=resume, overwrite=overwrite))


def restore_run(config: Config, ranks: Ranks) -> None:
    """Fetch a run from its mirror where the run folder has no checkpoint, and the mirror has one. Collective.

    Raises:
        ConfigError: If nothing installed can read the URL.
        CheckpointError: If the store cannot be read, or no checkpoint there is whole.
    """
    run = Path(config.run)
    if not ranks.broadcast(CheckpointFolder(run / CHECKPOINTS, ranks).was_used()):
        _on_first(ranks, config.train.mirror, lambda: _fetch_run(config.train.mirror, run))


def _on_first(ranks: Ranks, url: str, do: Callable[[], Found]) -> Found | None:
    """Do something on rank 0, and raise on all ranks what it raises. Collective."""
    found, problem = None, None
    if ranks.is_first:
        try:
            with store_errors(url, CheckpointError):
                found = do()
        except EM3Error as error:
            problem = error
    problem = ranks.broadcast(problem)
    if problem is not None:
        raise problem
    return found


def _fetch_run(url: str, run: Path) -> None:
    store = _Store(url)
    steps = store.steps()
    if not steps:
        return
    folder = run / f".{CHECKPOINTS}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    newest = next((step for step in reversed(steps) if _fetch_whole(store, step, folder)), None)
    if newest is None:
        raise CheckpointError(f"{url}: none of the {len(steps)} checkpoints is whole; start anew with --overwrite")
    progress = json.loads((folder / f"step-{newest}" / PROGRESS_FILE).read_text(encoding="utf-8"))
    if progress["best_step"] in steps and progress["best_step"] != newest:
        _fetch_whole(store, progress["best_step"], folder)
    store.get_run_files(run)
    # Last, and at once: what has checkpoints is not fetched again.
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    os.rename(folder, run / CHECKPOINTS)
    manifest.sync(run)
    logger.info("fetched step %d of %s to %s", newest, url, run)


def _fetch_whole(store: "_Store", step: int, folder: Path) -> bool:
    """Fetch a checkpoint and return whether it is whole; another is left out."""
    place = folder / f"step-{step}"
    try:
        store.get(step, place)
    except OtherFormat:
        raise
    except CheckpointError as error:
        logger.warning("%s: passed over, %s", store.url, error)
        shutil.rmtree(place, ignore_errors=True)
        return False
    return True


class _Store:
    """Checkpoints and files of a run at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = open_store(url)

    def found(self) -> dict[int, bool]:
        """Return the steps of which there is any file, and whether the manifest is."""
        self._files.invalidate_cache()
        found: dict[int, bool] = {}
        for path in map(PurePosixPath, self._files.find(f"{self._root}/{CHECKPOINTS}")):
            step = path.parent.name.removeprefix("step-")
            if step.isdigit():
                found[int(step)] = found.get(int(step), False) or path.name == MANIFEST_FILE
        return found

    def steps(self) -> list[int]:
        """Return the steps whose manifests are there, in increasing order."""
        return sorted(step for step, complete in self.found().items() if complete)

    def holds_run(self) -> bool:
        """Return whether there is a run, with checkpoints or not yet."""
        return bool(self.found()) or bool(self._files.exists(f"{self._root}/{CONFIG_FILE}"))

    def clear(self) -> None:
        """Remove a run, the manifests of its checkpoints first."""
        for step in self.found():
            self.remove(step)
        for path in self._files.find(self._root):
            self._files.rm_file(path)

    def put(self, step: int, folder: Path) -> None:
        """Put a checkpoint, its manifest last, unless it is there."""
        own, place = (folder / MANIFEST_FILE).read_bytes(), self._place(step)
        if self._files.exists(f"{place}/{MANIFEST_FILE}"):
            if self._files.cat_file(f"{place}/{MANIFEST_FILE}") == own:
                return
            self.remove(step)
        for name in [*manifest.read_manifest(folder), MANIFEST_FILE]:
            self.put_file(folder / name, f"{CHECKPOINTS}/step-{step}/{name}")

    def put_file(self, path: Path, name: str) -> None:
        place = f"{self._root}/{name}"
        self._files.makedirs(str(PurePosixPath(place).parent), exist_ok=True)
        self._files.put_file(str(path), place)

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first."""
        place = self._place(step)
        for part in (f"{place}/{MANIFEST_FILE}", place):
            if self._files.exists(part):
                self._files.rm(part, recursive=True)

    def get(self, step: int, folder: Path) -> None:
        """Fetch a checkpoint to a new folder and compare it with its manifest.

        Raises:
            OtherFormat: If another version of this program has written it.
            CheckpointError: If it is damaged.
        """
        folder.mkdir(parents=True)
        with store_errors(self._place(step), CheckpointError):
            self._files.get_file(f"{self._place(step)}/{MANIFEST_FILE}", str(folder / MANIFEST_FILE))
            names = list(manifest.read_manifest(folder))
            for name in names:
                if PurePosixPath(name).name != name:
                    raise CheckpointError(f"{self._place(step)}: lists a file {name}, which no checkpoint has")
                self._files.get_file(f"{self._place(step)}/{name}", str(folder / name))
            manifest.verify(folder, names)

    def get_run_files(self, run: Path) -> None:
        """Fetch the files besides checkpoints."""
        for path in self._files.find(self._root):
            name = PurePosixPath(path).relative_to(self._root)
            if ".." in name.parts:
                raise CheckpointError(f"{self.url}: holds a file called {name}, which a run never does")
            if name.parts[0] != CHECKPOINTS:
                (run / name).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(path, str(run / name))

    def _place(self, step: int) -> str:
        return f"{self._root}/{CHECKPOINTS}/step-{step}"
