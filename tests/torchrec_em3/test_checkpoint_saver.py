"""Checkpoints written in the background: the same bytes, whatever training does meanwhile; errors surface."""

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from torchrec_em3 import checkpoint
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_manifest import Digest, read_manifest
from torchrec_em3.checkpoint_saver import CheckpointSaver, copy_state
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import CheckpointError, Preempted
from torchrec_em3.faults import VARIABLE
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.train import Trainer


def config_for(data: Path, run: Path, *, background: bool) -> Config:
    options = TrainConfig(epochs=1, log_every=1, checkpoint_every=5, keep_checkpoints=50, async_checkpoints=background)
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=64, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3),
        train=options,
    )


def shards(run: Path, step: int) -> dict[str, Digest]:
    return {name: d for name, d in read_manifest(run / f"checkpoints/step-{step}").items() if "distcp" in name}


def fit(config: Config) -> Any:
    with process_group() as ranks:
        return train(resolve_parts(config), ranks)


def mutate(sharded: ShardedModel) -> None:
    """Change all that a training step may change, in place."""
    with torch.no_grad():
        for tensor in _leaves(checkpoint._tensors(sharded)):
            tensor.add_(1)


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif hasattr(value, "local_shards"):
        for shard in value.local_shards():
            yield shard.tensor
    else:
        yield value


def save_while_training(config: Config, folder: str) -> tuple[bool, bool]:
    """Save a step at once and in the background while the state changes; return whether the writer was held up."""
    with process_group() as ranks:
        config = resolve_parts(config)
        sharded = build_sharded(config, open_data(config), ranks)
        sharded.optimizer.optimizers[1][1].init_state()
        CheckpointFolder(Path(folder) / "at_once/checkpoints", ranks).save(7, sharded, {"best_step": 7})
        later = CheckpointFolder(Path(folder) / "later/checkpoints", ranks)
        go = threading.Event()
        write = later.write

        def held(*arguments: Any) -> None:
            assert go.wait(60)
            write(*arguments)

        later.write = held  # type: ignore[method-assign]
        with CheckpointSaver(later, ranks, background=True, keep=1) as saver:
            saver.save(7, sharded, {"best_step": 7}, best_step=7)
            before = later.steps() == []
            mutate(sharded)
            go.set()
        return before, later.steps() == [7]


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    with Gang(2, timeout=240) as two:
        yield two


def test_the_same_bytes_although_the_state_changes_meanwhile(tiny_data: Path, tmp_path: Path) -> None:
    assert save_while_training(config_for(tiny_data, tmp_path, background=True), str(tmp_path)) == (True, True)
    assert shards(tmp_path / "later", 7) == shards(tmp_path / "at_once", 7)


@pytest.mark.slow
def test_the_same_bytes_on_two_ranks(gang: Gang, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_data, tmp_path, background=True)
    assert gang.run(save_while_training, config, str(tmp_path)) == [(True, True)] * 2
    assert shards(tmp_path / "later", 7) == shards(tmp_path / "at_once", 7)
    assert len(shards(tmp_path / "later", 7)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_is_the_same_and_so_is_each_checkpoint(
    gang: Gang, tiny_data: Path, tmp_path: Path, world_size: int
) -> None:
    for name in ("at_once", "later"):
        config = config_for(tiny_data, tmp_path / name, background=name == "later")
        fit(config) if world_size == 1 else gang.run(fit, config)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("at_once", "later")]
    assert lines[0] == lines[1]
    steps = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("at_once", "later")]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 3
    for name in steps[0]:
        number = int(name.removeprefix("step-"))
        assert shards(tmp_path / "at_once", number) == shards(tmp_path / "later", number)


def fail_on_rank_one(config: Config) -> tuple[str, int, list[int]]:
    with pytest.MonkeyPatch.context() as patch, process_group() as ranks:
        patch.setenv(VARIABLE, f"save.shard:{ranks.world_size - 1}:2:full")
        patch.setenv("PYTEST_CURRENT_TEST", "in a rank")
        patch.setenv("RANK", str(dist.get_rank()))
        with pytest.raises(CheckpointError) as raised:
            train(resolve_parts(config), ranks)
        steps = CheckpointFolder(Path(config.run) / "checkpoints", ranks).steps()
    return str(raised.value), raised.value.exit_code, steps


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_all_and_keeps_the_earlier_checkpoint(
    gang: Gang, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_data, tmp_path / "run", background=True)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluate_every=8, checkpoint_every=4))
    for said, code, steps in gang.run(fail_on_rank_one, config):
        assert "cannot write checkpoint" in said
        assert "No space left on device; earlier checkpoints are kept" in said
        assert (code, steps) == (4, [4])
    assert not list((tmp_path / "run/checkpoints").glob(".step-*"))


def test_an_error_surfaces_in_a_later_step(tiny_data: Path, tmp_path: Path) -> None:
    said, code, steps = fail_on_rank_one(config_for(tiny_data, tmp_path / "run", background=True))
    assert said.endswith("No space left on device; earlier checkpoints are kept")
    assert (code, steps) == (4, [5])


@pytest.mark.slow
def test_sigterm_waits_for_the_save_and_resume_continues_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, stopped = (config_for(tiny_data, tmp_path / name, background=True) for name in ("calm", "stopped"))
    fit(calm)
    original = Trainer._train_step

    def step(self: Trainer, batches: Any) -> bool:
        if self.progress.step == 5:  # the save of step 5 has just begun
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch, process_group() as ranks:
        patch.setattr(Trainer, "_train_step", step)
        with pytest.raises(Preempted, match="stopped by SIGTERM at step 6"):
            train(resolve_parts(stopped), ranks)
        assert CheckpointFolder(tmp_path / "stopped/checkpoints", ranks).steps() == [5, 6]
    with process_group() as ranks:
        train(resolve_parts(stopped), ranks, resume=True)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("calm", "stopped")]
    assert lines[0] == lines[1]


def test_a_copy_shares_nothing_and_holds_tensors_alone() -> None:
    state = {"a": {"b": torch.nn.Parameter(torch.ones(3))}}
    copied = copy_state(state)
    assert torch.equal(copied["a"]["b"], state["a"]["b"])
    assert copied["a"]["b"].data_ptr() != state["a"]["b"].data_ptr()
    with pytest.raises(TypeError, match="a checkpoint holds tensors alone, not a float"):
        copy_state({"rate": 0.1})
