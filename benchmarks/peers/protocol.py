"""How the contenders take turns: worker processes that stay warm and train a few steps when told to.

Both ends of the conversation are here. A worker gets the rows, its task and a pipe as arguments, warms up, writes one
line of JSON into the pipe, and from then on answers each line on its standard input, a turn to train, with a line in
the pipe. Its standard output is the library's, which may print what it likes, also while it is imported.
Only the standard library and numpy are imported, for the workers run in other environments than the project's.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from rows import Rows

__all__ = ["MODES", "Contender", "Mode", "Task", "Turn", "Worker", "cycle", "serve"]

Mode = Literal["bare", "full"]
MODES: tuple[Mode, ...] = ("bare", "full")
WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every contender builds.

    Attributes:
        embedding_dim: Width of the ID embeddings.
        hidden: Hidden widths of the DNN.
        attention_hidden: Hidden widths of the target attention.
        folder: Folder for files of the worker's own.
        options: What distinguishes two contenders that share a worker script.
    """

    embedding_dim: int
    hidden: list[int]
    attention_hidden: list[int]
    folder: str
    options: dict[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    """One model in training."""

    def bare(self, steps: int) -> float:
        """Train that many steps on batches that are ready in memory; return the last loss or the mean."""

    def full(self, steps: int) -> float:
        """Train that many steps on batches from the library's own loader; return the last loss or the mean."""


@dataclass(frozen=True)
class Turn:
    """What a turn cost.

    Attributes:
        seconds_per_1k: CPU seconds of the whole process per 1,000 samples.
        loss: Last loss of the turn, or the mean.
        peak_gib: Most memory that the process has had resident so far.
    """

    seconds_per_1k: float
    loss: float
    peak_gib: float


def serve(build: Callable[[Rows, Task], Contender], packages: Sequence[str]) -> None:
    """Be a worker: build the contender, warm it up, then train whenever a line asks for it, until there is no more.

    Args:
        build: Makes the contender.
        packages: Distributions whose versions to report.
    """
    with os.fdopen(int(sys.argv[3]), "w", buffering=1) as answers:
        rows, task = Rows.read(Path(sys.argv[1])), Task(**json.loads(sys.argv[2]))
        contender = build(rows, task)
        for mode in MODES:
            getattr(contender, mode)(WARM_UP_STEPS)
        print(json.dumps({package: version(package) for package in packages}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            started = time.process_time()
            loss = getattr(contender, request["mode"])(request["steps"])
            seconds = time.process_time() - started
            turn = Turn(seconds / (request["steps"] * rows.batch_size) * 1000, loss, _peak_gib())
            print(json.dumps(asdict(turn)), file=answers)


def cycle(batches: Sequence[Any]) -> Iterator[Any]:
    """Yield the batches again and again."""
    while True:
        yield from batches


def _peak_gib() -> float:
    """Return the high-water mark of this process; unlike `ru_maxrss` it does not inherit that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024**2


class Worker:
    """The other end: a worker process, warm from the moment the object exists."""

    def __init__(self, name: str, python: Path, script: Path, rows: Path, task: Task, env: Mapping[str, str]) -> None:
        """Start the process and wait until it has warmed up.

        Args:
            name: What to call it in messages.
            python: Interpreter of its environment.
            script: Worker script.
            rows: File of the rows.
            task: What to build; its folder is made, and what the library prints goes to worker.log there.
            env: Environment variables of the process.

        Raises:
            RuntimeError: If it dies.
        """
        self.name = name
        self._log = Path(task.folder) / "worker.log"
        self._log.parent.mkdir(parents=True)
        reader, writer = os.pipe()
        with self._log.open("w") as log, os.fdopen(writer, "w"):
            self._process = subprocess.Popen(
                [python, script, rows, json.dumps(asdict(task)), str(writer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=env,
                cwd=task.folder,
                pass_fds=(writer,),
            )
        self._answers = os.fdopen(reader)
        self.versions: dict[str, str] = self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._answers.close()

    def turn(self, mode: Mode, steps: int) -> Turn:
        """Let it train `steps` steps.

        Raises:
            RuntimeError: If it dies or its loss is not finite.
        """
        assert self._process.stdin is not None
        print(json.dumps({"mode": mode, "steps": steps}), file=self._process.stdin, flush=True)
        turn = Turn(**self._answer())
        if not math.isfinite(turn.loss):
            raise RuntimeError(f"{self.name}: loss is {turn.loss} after {steps} steps of '{mode}'")
        return turn

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name}: the worker ended with exit code {code}; it said\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer
