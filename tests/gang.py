"""Run a function on several ranks: local processes that share one gloo process group.

    from tests.gang import Gang, run_ranks

    def add_up(start: int) -> int:                # top-level, in any importable or test file
        total = torch.tensor(start + dist.get_rank())
        dist.all_reduce(total)
        return int(total)

    assert run_ranks(2, add_up, 10) == [21, 21]   # starts two processes, returns the results in rank order

    with Gang(2) as gang:                         # starting costs seconds: one gang can serve many calls
        gang.run(add_up, 10)
        gang.run(add_up, 20)

A rank sees the environment that torchrun would give it (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR ...), one torch
thread and an initialised process group. Arguments and results are pickled by value. When a rank raises, dies or does
not answer in time, every process is killed and one GangError tells what each rank did; a Gang starts afresh on its
next call.
"""

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

__all__ = ["Gang", "GangError", "run_ranks", "start_process"]

HOST = "127.0.0.1"
TIMEOUT_SECONDS = 120.0
IMPORTED = ("pytest", "hypothesis", "torchrec_em3.commands.train", "torchrec_em3.commands.evaluate")
GRACE_SECONDS = 2.0  # how long the others may still report once one rank has failed


class GangError(Exception):
    """A rank raised, died or did not answer in time; `errors` holds the text by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"[rank {rank}] {text.rstrip()}" for rank, text in sorted(errors.items())))
        self.errors = errors


class _Call(NamedTuple):
    """A function by name and file (a test file need not be importable), its pickled arguments and the time limit."""

    module: str
    file: str
    name: str
    arguments: bytes
    seconds: float


class _Rank(NamedTuple):
    process: BaseProcess
    connection: Connection


class Gang:
    """Processes of one gloo group that serve calls one after the other; a context manager.

    Args:
        world_size: Number of processes.
        timeout: Seconds that a call may take.
        import_anew: Import everything in each process, for modules that read the environment when they are imported.
    """

    def __init__(self, world_size: int, timeout: float = TIMEOUT_SECONDS, import_anew: bool = False) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._import_anew = import_anew
        self._ranks: list[_Rank] = []
        self._store: TCPStore | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `fn(*args)` on every rank at once and return the results in rank order.

        Args:
            fn: A top-level function.
            args: The same for all ranks; `dist.get_rank()` tells them apart.
            timeout: Seconds until everything is killed; the gang's own if None. Counts the start of the processes too.

        Raises:
            GangError: If any rank raised, died or did not answer in time.
        """
        seconds = self.timeout if timeout is None else timeout
        if "." in fn.__qualname__:
            raise ValueError(f"{fn.__qualname__} is not a top-level function: other processes cannot find it")
        call = _Call(fn.__module__, fn.__code__.co_filename, fn.__name__, pickle.dumps(args), seconds)
        deadline = time.monotonic() + seconds
        try:
            if not self._ranks:
                self._start(seconds)
            for rank in self._ranks:
                with contextlib.suppress(BrokenPipeError):  # a dead rank: _collect says so
                    rank.connection.send(call)
            return self._collect(deadline, seconds)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """End the processes, gently first."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.connection.send(None)
        deadline = time.monotonic() + GRACE_SECONDS
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def __enter__(self) -> "Gang":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, seconds: float) -> None:
        """Start the processes; the store lives here, on a port that the system picks, so that gangs cannot collide."""
        limit = timedelta(seconds=seconds)
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=limit)
        for rank in range(self.world_size):
            ours, theirs = multiprocessing.Pipe()
            target, args = _serve, (rank, self.world_size, self._store.port, seconds, theirs)
            process = _start_anew(target, args) if self._import_anew else start_process(target, *args)
            theirs.close()
            self._ranks.append(_Rank(process, ours))

    def _collect(self, deadline: float, seconds: float) -> list[Any]:
        """Wait for every rank's answer; after the first failure the others get a short grace."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(enumerate(self._ranks))
        while waiting and (left := deadline - time.monotonic()) > 0:
            wait([rank.connection for rank in waiting.values()], left)
            for number, rank in list(waiting.items()):
                if not rank.connection.poll():
                    continue
                del waiting[number]
                try:
                    worked, answer = pickle.loads(rank.connection.recv_bytes())
                    (results if worked else errors)[number] = answer
                except EOFError:
                    rank.process.join(GRACE_SECONDS)
                    errors[number] = f"process died with exit code {rank.process.exitcode}"
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for number in waiting:
            errors[number] = "was still waiting when another rank failed" if errors else f"no answer in {seconds:g} s"
        if errors:
            raise GangError(errors)
        return [results[number] for number in range(self.world_size)]

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.process.close()
            rank.connection.close()
        self._ranks = []
        self._store = None


def start_process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process that has torch and this package imported already, with the environment of this one.

    Importing takes longer than most tests. So one server imports, before it has threads of which a fork could inherit
    a held lock, and the processes are its forks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(target=_in_environment, args=(dict(os.environ), target, args))
    process.start()
    return process


def _start_anew(target: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def _in_environment(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Call `fn(*args)` once on each of `world_size` fresh ranks; see `Gang.run`. No process is left behind."""
    with Gang(world_size, timeout) as gang:
        return gang.run(fn, *args)


def _serve(rank: int, world_size: int, port: int, seconds: float, connection: Connection) -> None:
    """Life of one rank: join the group, answer calls until told to stop."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR=HOST, MASTER_PORT=str(port))
    # The store is the parent's: rank 0 must not open one, as under torchrun.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    while (call := connection.recv()) is not None:
        faulthandler.dump_traceback_later(max(1.0, call.seconds - 1.0))
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
            answer = pickle.dumps((True, _find(call)(*pickle.loads(call.arguments))))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(answer)
    if dist.is_initialized():
        dist.destroy_process_group()


def _find(call: _Call) -> Callable[..., Any]:
    """Return the function that `call` names, loading its file under the name it had for the caller."""
    module: ModuleType | None = sys.modules.get(call.module)
    if module is None or call.module == "__main__":
        with contextlib.suppress(ImportError):
            module = importlib.import_module(call.module)
    if module is None or getattr(module, "__file__", None) != call.file:
        spec = importlib.util.spec_from_file_location(call.module, call.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[call.module] = module
        spec.loader.exec_module(module)
    return getattr(module, call.name)


def _die_with_parent() -> None:
    """End this process when the one that started it is gone, also inside a collective that would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
