"""A step that hangs ends its process, with the stacks of all threads; steps in time do not."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.program import ROOT, finish
from tests.torchrec_em3.test_faults import TORCHRUN, command
from torchrec_em3 import watchdog
from torchrec_em3.config import TrainConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.watchdog import EXIT_CODE, StepWatchdog

HANGS = """
import sys, threading, time
from torchrec_em3 import watchdog

watchdog.GRACE_SECONDS = 0.0
def stuck_in_another_thread():
    time.sleep(60)
def stuck_in_a_step():
    time.sleep(60)
threading.Thread(target=stuck_in_another_thread, daemon=True).start()
with watchdog.StepWatchdog(float(sys.argv[1]), 3) as dog:
    with dog.step():
        stuck_in_a_step()
"""


def test_a_step_that_hangs_ends_the_process_with_all_stacks() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS, "0.2"], cwd=ROOT, capture_output=True, timeout=50)
    said = ended.stderr.decode()
    assert ended.returncode == EXIT_CODE == 7
    assert said.startswith("em3: a step took more than --train.step_timeout 0.2 s on rank 3; its threads are below.")
    assert "in stuck_in_a_step" in said
    assert "in stuck_in_another_thread" in said


def test_only_a_step_that_lasts_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    dog = StepWatchdog(10.0, 0)
    for _ in range(3):
        now[0] += 30.0
        assert not dog._is_late(), "time between steps does not count"
        with dog.step():
            now[0] += 9.0
            assert not dog._is_late()
    with pytest.raises(KeyError), dog.step():
        raise KeyError
    now[0] += 30.0
    assert not dog._is_late(), "a step that raised has ended"
    with dog.step():
        now[0] += 11.0
        assert dog._is_late()


def test_the_thread_ends_with_the_watch_and_zero_needs_none() -> None:
    with StepWatchdog(60.0, 0) as dog:
        assert dog._thread.is_alive()
    assert not dog._thread.is_alive()
    with StepWatchdog(0.0, 0) as dog, dog.step():
        assert not dog._thread.is_alive()
    with pytest.raises(ConfigError, match=r"train.step_timeout is -1"):
        TrainConfig(step_timeout=-1)


@pytest.mark.slow
def test_when_one_rank_hangs_every_rank_says_where(tiny_data: Path, tmp_path: Path) -> None:
    arguments = [*TORCHRUN, *command(tiny_data, tmp_path / "run", "--train.step_timeout", "30")]
    arguments[arguments.index("--max_restarts") + 1] = "0"
    assert finish(arguments, tmp_path / "log", "step:1:9:hang") != 0
    said = (tmp_path / "log").read_text()
    assert all(f"--train.step_timeout 30 s on rank {rank}" in said for rank in (0, 1))
    assert "in fault_point" in said, "the place of the rank that hangs"
    assert said.count("in _train_step") == 2, "the stacks of both ranks"
    assert said.count(f"exitcode  : {EXIT_CODE}") == 2
