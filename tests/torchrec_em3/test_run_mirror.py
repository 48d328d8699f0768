"""The copy of a run at a URL: complete or not there, kept small, and never in the way of training."""

import dataclasses
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.stopped_training import before_step, interrupt
from torchrec_em3.checkpoint_manifest import digest, write_manifest
from torchrec_em3.commands.train import main, train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import CheckpointError, ConfigError
from torchrec_em3.parsing import dump_config, resolve_parts
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.run_mirror import RunMirror, open_mirror, restore_run

FILES = (".metadata", "__0_0.distcp", "progress.json")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as one:
        yield one


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """A run whose mirror is in memory."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    mirror = f"memory://{tmp_path.name}"
    yield Config(run=str(tmp_path / "run"), train=TrainConfig(mirror=mirror, keep_checkpoints=1))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    MemoryFileSystem.store.clear()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What this project warns of, although a command that ran before has taken its log lines for itself."""
    monkeypatch.setattr(logging.getLogger("torchrec_em3"), "propagate", True)
    caplog.set_level(logging.WARNING, "torchrec_em3")
    return caplog


def save(config: Config, step: int, best_step: int = -1) -> None:
    """Write what has the form of a checkpoint."""
    folder = Path(config.run) / "checkpoints" / f"step-{step}"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(json.dumps({"step": step, "best_step": best_step, "name": name}))
    write_manifest(folder, {name: digest(folder / name) for name in FILES})


def opened(config: Config, *, resume: bool = False, overwrite: bool = False) -> RunMirror:
    return RunMirror(config, resume=resume, overwrite=overwrite)


def send(config: Config, mirror: RunMirror, step: int, best_step: int = -1) -> None:
    """Copy a checkpoint and wait."""
    save(config, step, best_step)
    mirror.send(step, best_step)
    for _, job in list(mirror._jobs):
        job.result()


def remote(config: Config) -> list[str]:
    """Return the files of the copy."""
    files, root = fsspec.url_to_fs(config.train.mirror)
    return sorted(path.removeprefix(f"{root}/") for path in files.find(root))


def remote_steps(config: Config) -> set[str]:
    return {name.split("/")[1] for name in remote(config) if name.startswith("checkpoints/")}


def restored(config: Config, ranks: Ranks) -> list[str]:
    """Lose the machine and fetch the run; return the checkpoints that are there."""
    shutil.rmtree(config.run)
    restore_run(config, ranks)
    return sorted(path.name for path in (Path(config.run) / "checkpoints").iterdir())


def fail_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the store fail at the n-th file that is put from now on and at all later ones; return what heals it."""
    original, count = MemoryFileSystem.put_file, 0

    def put_file(self: Any, *args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count >= number:
            raise ConnectionError("the store is gone\nand more lines")
        original(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return lambda: monkeypatch.setattr(MemoryFileSystem, "put_file", original)


def test_a_checkpoint_comes_back_as_it_was(config: Config, ranks: Ranks) -> None:
    with opened(config) as mirror:
        send(config, mirror, 5)
    before = {path: path.read_bytes() for path in Path(config.run).rglob("*") if path.is_file()}
    assert restored(config, ranks) == ["step-5"]
    assert {path: path.read_bytes() for path in Path(config.run).rglob("*") if path.is_file()} == before


def test_the_best_and_the_newest_are_kept(config: Config, ranks: Ranks) -> None:
    with opened(config) as mirror:
        for step, best in ((5, 5), (10, 5), (15, 5)):
            send(config, mirror, step, best)
        assert remote_steps(config) == {"step-5", "step-15"}
    assert restored(config, ranks) == ["step-15", "step-5"]


@pytest.mark.fault
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_upload_that_dies_half_way_leaves_the_checkpoint_before(
    config: Config, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, number: int
) -> None:
    with opened(config) as mirror:
        send(config, mirror, 5)
        heal = fail_at(number, monkeypatch)
        send(config, mirror, 10)
        (line,) = warnings.messages
        assert "copy of checkpoint step 10 failed: memory://" in line
        assert "ConnectionError: the store is gone; " in line
        assert restored(config, ranks) == ["step-5"]
        heal()
        send(config, mirror, 10)
        send(config, mirror, 15)
        assert remote_steps(config) == {"step-15"}, "what the dead upload left is removed too"
    assert restored(config, ranks) == ["step-15"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_copy_is_passed_over(
    config: Config, ranks: Ranks, warnings: pytest.LogCaptureFixture, name: str
) -> None:
    with opened(config) as mirror:
        send(config, mirror, 5)
        send(config, mirror, 10, best_step=5)
    files, root = fsspec.url_to_fs(config.train.mirror)
    place = f"{root}/checkpoints/step-10/{name}"
    files.pipe_file(place, files.cat_file(place).replace(b"e", b"f", 1))
    assert restored(config, ranks) == ["step-5"]
    assert "step-10" in warnings.text
    place = f"{root}/checkpoints/step-5/{FILES[1]}"
    files.pipe_file(place, b"")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints is whole; start anew with --overwrite"):
        restored(config, ranks)


def test_a_manifest_that_names_a_file_elsewhere_is_passed_over(config: Config, ranks: Ranks) -> None:
    with opened(config) as mirror:
        send(config, mirror, 5)
    files, root = fsspec.url_to_fs(config.train.mirror)
    place = f"{root}/checkpoints/step-5/manifest.json"
    files.pipe_file(place, files.cat_file(place).replace(b"__0_0.distcp", b"../../../evil"))
    with pytest.raises(CheckpointError, match="none of the 1"):
        restored(config, ranks)
    assert not (Path(config.run).parent / "evil").exists()


def test_a_run_with_checkpoints_is_left_alone(config: Config, ranks: Ranks) -> None:
    with opened(config) as mirror:
        send(config, mirror, 5)
    shutil.rmtree(Path(config.run) / "checkpoints" / "step-5")
    save(config, 3)
    restore_run(config, ranks)
    assert [path.name for path in (Path(config.run) / "checkpoints").iterdir()] == ["step-3"]


def test_what_is_being_copied_is_held(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    original, gate = MemoryFileSystem.put_file, threading.Event()

    def put_file(self: Any, *args: Any, **options: Any) -> None:
        gate.wait(30)
        original(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with opened(config) as mirror:
        for step in (5, 10, 15):
            save(config, step)
            mirror.send(step, -1)
        assert {5, 10, 15} <= mirror.held
        gate.set()
        mirror.finish()
        assert not mirror.held
    assert "step-10" not in remote_steps(config), "a newer one had come before its turn"


def test_the_end_says_when_the_last_checkpoint_is_not_there(
    config: Config, monkeypatch: pytest.MonkeyPatch, ranks: Ranks
) -> None:
    heal = fail_at(1, monkeypatch)
    with opened(config) as mirror:
        send(config, mirror, 5)
        with pytest.raises(CheckpointError, match=r"complete in .*run, but its copy is not: memory://.* is gone; "):
            mirror.finish()
        heal()
        (Path(config.run) / "summary.json").write_text("{}")
        mirror.finish()
    assert {"summary.json", "metrics.jsonl", "checkpoints/step-5/manifest.json"} <= set(remote(config))


def test_another_run_is_not_overwritten_unasked(config: Config, ranks: Ranks) -> None:
    with opened(config) as mirror:
        send(config, mirror, 5)
    with pytest.raises(ConfigError, match="already holds a run; choose another URL, or add --resume or --overwrite"):
        open_mirror(config, ranks, resume=False, overwrite=False)
    with opened(config, resume=True):
        names = sorted([*FILES, "manifest.json"])
        assert remote(config) == [*(f"checkpoints/step-5/{name}" for name in names), "metrics.jsonl"]
    with opened(config, overwrite=True):
        assert remote(config) == []


def test_urls_that_cannot_be_are_refused(config: Config, ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"--train.mirror is runs/a, must be a URL such as s3://bucket/run"):
        TrainConfig(mirror="runs/a")
    unknown = dataclasses.replace(config, train=TrainConfig(mirror="nosuch://bucket/run"))
    with pytest.raises(ConfigError, match="nosuch"):
        restore_run(unknown, ranks)


@pytest.mark.slow
def test_a_new_machine_goes_on_to_the_same_losses(tiny_data: Path, config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config,
        data=str(tiny_data),
        loader=LoaderConfig(batch_size=128, max_history=10, shuffle="strata"),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3),
        train=dataclasses.replace(config.train, epochs=1, log_every=1, checkpoint_every=5),
    )
    shutil.rmtree(config.run)
    calm = dataclasses.replace(config, run=str(tmp_path / "calm"), train=dataclasses.replace(config.train, mirror=""))
    with process_group() as ranks:
        train(resolve_parts(calm), ranks)
    (tmp_path / "config.yaml").write_text(dump_config(resolve_parts(config)))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--restartable"]
    with before_step(12, interrupt), pytest.raises(KeyboardInterrupt):
        main(arguments)
    shutil.rmtree(config.run)
    main(arguments)
    metrics = [(Path(run) / "metrics.jsonl").read_text() for run in (calm.run, config.run)]
    assert metrics[0] == metrics[1]
    files, root = fsspec.url_to_fs(config.train.mirror)
    assert files.cat_file(f"{root}/summary.json") == (Path(config.run) / "summary.json").read_bytes()
    assert "predictions/test.npz" in remote(config)
