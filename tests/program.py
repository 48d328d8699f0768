"""The program `em3` in a process of its own, which a test may kill.

A command that begins with `torchrec_em3` runs in a fork of a process that has imported it already; torchrun and TorchX
start as a user would start them.
"""

import os
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.gang import start_process
from torchrec_em3 import cli
from torchrec_em3.faults import VARIABLE

__all__ = ["ROOT", "SECONDS", "exit_code", "finish", "start"]

ROOT = Path(__file__).parents[1]
SECONDS = 800


def start(arguments: list[str], log: Path, fault: str | None = None) -> BaseProcess:
    """Start `torchrec_em3` with arguments, its output at the end of `log`, with EM3_FAULT set to `fault` if given."""
    assert arguments[0] == "torchrec_em3"
    return start_process(_be_em3, arguments[1:], log, _environment(fault))


def finish(arguments: list[str], log: Path, fault: str | None = None) -> int:
    """Run `python -m` with these arguments to its end; returns the exit code."""
    if arguments[0] == "torchrec_em3":
        process = start(arguments, log, fault)
        try:
            return exit_code(process)
        finally:
            process.kill()
    with log.open("ab") as output:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=_environment(fault), stdout=output, stderr=output, timeout=SECONDS
        ).returncode


def exit_code(process: BaseProcess) -> int:
    """Wait for the end; a signal's number is negative."""
    process.join(SECONDS)
    assert process.exitcode is not None, f"still running after {SECONDS} seconds"
    return process.exitcode


def _be_em3(arguments: list[str], log: Path, variables: dict[str, str]) -> None:
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = ["em3", *arguments]
    cli.main()


def _environment(fault: str | None) -> dict[str, str]:
    faults = {} if fault is None else {VARIABLE: fault}
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    alone["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{alone['PATH']}"  # TorchX starts torchrun by its name
    return {**alone, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **faults}
