"""Runs that are really killed, in processes of their own, and continued: losses and weights of an undisturbed run."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.program import SECONDS, exit_code, finish, start
from torchrec_em3.checkpoint_manifest import read_manifest
from torchrec_em3.errors import ConfigError
from torchrec_em3.faults import VARIABLE, fault_point

SAVE_PLACES = ["save.start", "save.shard", "save.metadata", "save.progress", "save.manifest", "save.done"]
STEP_PLACES = ["step", "backward", "optimizer", "validate", "load"]
STEP_PHASES = ["batch", "exchange", "forward", "backward", "optimizer"]
PHASES = {**dict.fromkeys(STEP_PHASES, 16), "validate": 2, "metrics": 2, "save.start": 3, "save.shard": 3}
"""What both ranks pass through, and the time at which a fault strikes there, after the checkpoint of step 14."""
PHASE_FAULTS = [f"{place}:{rank}:{count}" for place, count in PHASES.items() for rank in (0, 1)]
ALWAYS = ("save.shard:1:3",)
"""What is tried whenever the tests run; a kill in a step is, too, by torchx."""
IN_BACKGROUND = ["--train.async_checkpoints", "true"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1", "-m"]


def command(data: Path, run: Path, *more: str) -> list[str]:
    options = "--loader.batch_size 64 --loader.max_history 10 --model.embedding_dim 8 --model.unknown_id_rate 0.2"
    options += " --model.history_options.rank 8 --model.alignment_weight 0.01"
    options += " --train.epochs 2 --train.log_every 1 --train.checkpoint_every 7 --train.evaluate_every 14"
    options += " --train.patience 50"
    return ["torchrec_em3", "train", "--data", str(data), "--run_folder", str(run), *options.split(), *more]


def torchx_command(config: Path, data: Path, run: Path) -> list[str]:
    options = f"-j 1x2 --config {config} --data {data} --run {run} --max_retries 1"
    launcher = f"torchx.cli.main run -s local_cwd -cfg log_dir={run.parent} torchx_specs/train.py:train"
    return [*launcher.split(), *options.split()]


def lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def same_result(run: Path, calm: Path) -> None:
    """Compare the losses and validations of every step, and the last checkpoint: tables, bank, optimizers, average."""
    assert lines(run) == lines(calm)
    last = max((calm / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))).name
    shards = [
        {name: found for name, found in read_manifest(folder / "checkpoints" / last).items() if "distcp" in name}
        for folder in (run, calm)
    ]
    assert shards[0] == shards[1]


@pytest.fixture(scope="module")
def calm(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("calm") / "run"
    assert finish(command(tiny_data, run), run.parent / "log") == 0
    return run


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_instants(tiny_data: Path, tmp_path: Path, calm: Path) -> None:
    run, draw = tmp_path / "run", random.Random(0)
    expected, resume = len(lines(calm)), []
    for goal in sorted(draw.sample(range(8, expected - 4), 3)):
        process = start(command(tiny_data, run, *resume), tmp_path / "log")
        try:
            deadline = time.monotonic() + SECONDS
            while len(lines(run)) < goal or process.exitcode is not None:
                assert process.exitcode is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.03))
        finally:
            process.kill()
        assert exit_code(process) == -signal.SIGKILL
        resume = ["--resume"]
    assert finish(command(tiny_data, run, "--resume"), tmp_path / "log") == 0
    same_result(run, calm)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("places", "options"),
    [
        (SAVE_PLACES[:3], []),
        (SAVE_PLACES[3:], []),
        (STEP_PLACES, []),
        (SAVE_PLACES[:3], IN_BACKGROUND),
        (SAVE_PLACES[3:], IN_BACKGROUND),
    ],
    ids=["files", "commit", "steps", "files in background", "commit in background"],
)
def test_killed_at_each_place(
    tiny_data: Path, tmp_path: Path, calm: Path, places: list[str], options: list[str]
) -> None:
    run = tmp_path / "run"
    before: set[str] = set()
    for number, place in enumerate(places):
        count = {"load": 1, "step": 20}.get(place, 2)
        resume = [*options, *(["--resume"] if number else [])]
        fault = f"{place}:0:{count}:kill"
        assert finish(command(tiny_data, run, *resume), tmp_path / "log", fault) == -signal.SIGKILL, place
        saved = {path.name for path in (run / "checkpoints").glob("step-*")}
        assert saved, "a good checkpoint is there at any time"
        before |= saved
    assert finish(command(tiny_data, run, *options, "--resume"), tmp_path / "log") == 0
    assert len(before) > 1, "the run went on between the kills"
    assert not list((run / "checkpoints").glob(".step-*")), "what a cut-off save leaves is removed"
    same_result(run, calm)


@pytest.fixture(scope="module")
def calm_two(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbs."""
    run = tmp_path_factory.mktemp("calm_two") / "run"
    assert finish([*TORCHRUN, *command(tiny_data, run)], run.parent / "log") == 0
    return run


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in ALWAYS else pytest.mark.long) for fault in PHASE_FAULTS]
)
def test_a_rank_killed_in_any_phase_starts_again(tiny_data: Path, tmp_path: Path, calm_two: Path, fault: str) -> None:
    recovers([*TORCHRUN, *command(tiny_data, tmp_path / "run")], tmp_path, calm_two, fault)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_killed_in_a_background_save_starts_again(tiny_data: Path, tmp_path: Path, calm_two: Path) -> None:
    arguments = [*TORCHRUN, *command(tiny_data, tmp_path / "run", *IN_BACKGROUND)]
    recovers(arguments, tmp_path, calm_two, "save.shard:1:3")


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 20))])
def test_torchx_goes_on_when_a_rank_is_killed_in_a_step(
    tiny_data: Path, tmp_path: Path, calm_two: Path, number: int
) -> None:
    """By `torchx run -s local_cwd`; place, rank and step are drawn, this after the first checkpoint."""
    draw = random.Random(number)
    place, rank, count = draw.choice(STEP_PHASES), draw.randrange(2), draw.randrange(9, 34)
    arguments = torchx_command(calm_two / "config.yaml", tiny_data, tmp_path / "run")
    recovers(arguments, tmp_path, calm_two, f"{place}:{rank}:{count}")


def recovers(arguments: list[str], folder: Path, calm: Path, fault: str) -> None:
    """Run two ranks of which one is killed, and compare with a run that nothing disturbs."""
    assert finish(arguments, folder / "log", f"{fault}:kill") == 0
    assert "resumed at step" in (folder / "log").read_text(), "the second attempt went on from a checkpoint"
    same_result(folder / "run", calm)


def test_faults_are_refused_outside_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "step:0:1:kill")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(ConfigError, match="EM3_FAULT is step:0:1:kill, but faults are for tests only"):
        fault_point("elsewhere")


def test_a_fault_strikes_at_its_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "here:0:2:full")
    fault_point("elsewhere")
    fault_point("here")
    with pytest.raises(OSError, match="No space left on device"):
        fault_point("here")
    fault_point("here")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv(VARIABLE, "here:0:1:full")
    fault_point("here")
