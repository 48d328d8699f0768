"""Continuous training: measured before trained on, once, in order; stopped, killed and resumed to the same losses."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import run_ranks
from tests.program import finish
from torchrec_em3 import follow as follow_module
from torchrec_em3.cli import run as em3
from torchrec_em3.commands.follow import follow
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.shards import END_FILE, list_shards, split_into_shards, write_shard
from torchrec_em3.errors import CheckpointError, ConfigError, DataError, Preempted
from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group

ROWS = 300  # of the test split, in 3 shards of about 100, of 4 steps each


def config_for(data: Path, run: Path) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=32, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3, unknown_id_rate=0.2),
        train=TrainConfig(epochs=1, log_every=1, checkpoint_every=2, keep_checkpoints=3),
    )


def fit(config: Config, shards: Path, start_from: Path | None = None, resume: bool = False, idle: float = 0.0) -> None:
    with process_group() as ranks:
        follow(resolve_parts(config), ranks, shards, start_from, resume=resume, idle=idle)


def lines(run: Path, phase: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if phase in ("", line["phase"])]


@pytest.fixture(scope="module")
def shards(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "shards"
    split_into_shards(PreparedData.open(tiny_data), "test", 3, folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    with process_group() as ranks:
        train(resolve_parts(config_for(tiny_data, run)), ranks)
    return run


@pytest.fixture(scope="module")
def calm(tiny_data: Path, shards: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over all shards that nothing disturbs."""
    run = tmp_path_factory.mktemp("calm") / "run"
    fit(config_for(tiny_data, run), shards, trained)
    return run


def test_every_row_is_trained_on_once_and_every_shard_measured_before(calm: Path, trained: Path, shards: Path) -> None:
    found = lines(calm)
    order = [(line["phase"], line["epoch"]) for line in found]
    assert order == [(phase, shard) for shard in range(3) for phase in ("progressive", *["train"] * 4)]
    assert found[-1]["samples"] == ROWS
    measured = lines(calm, "progressive")
    assert sum(line["n"] for line in measured) == ROWS
    assert measured[0]["samples"] == 0
    weight = np.array([line["n"] for line in measured])
    for name in ("auc", "gauc", "logloss"):
        values = np.array([line[name] for line in measured])
        assert measured[-1][f"cumulative_{name}"] == pytest.approx(float(values @ weight / weight.sum()))


def test_the_first_shard_is_measured_as_evaluation_measures_it(calm: Path, trained: Path, shards: Path) -> None:
    """The same model, rows and histories: the predictions of `em3 evaluate` on the first rows of the test split."""
    with np.load(trained / "predictions" / "test.npz") as found:
        count = lines(calm, "progressive")[0]["n"]
        expected = ranking_metrics(found["label"][:count], found["logit"][:count], user=found["user"][:count])
    for name in ("auc", "gauc", "ne", "logloss", "calibration"):
        assert lines(calm, "progressive")[0][name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("kind", ["SIGTERM", "killed"])
@pytest.mark.parametrize("stop_at", [2, pytest.param(4, marks=pytest.mark.slow), 7])
def test_a_stopped_stream_resumes_exactly(
    tiny_data: Path,
    tmp_path: Path,
    calm: Path,
    trained: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stop_at: int,
) -> None:
    """At step 4 the first shard ends; a kill loses what came after the last checkpoint, the measuring too."""
    config = config_for(tiny_data, tmp_path / "run")
    original = follow_module.Follower._train_step
    start = lines(calm)[0]["step"]

    def step(self: Any, batches: Any, stream: Any) -> bool:
        if kind == "SIGTERM" and self.progress.step == start + stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "killed" and self.progress.step == start + stop_at:
            raise KeyboardInterrupt
        return original(self, batches, stream)

    with monkeypatch.context() as patch:
        patch.setattr(follow_module.Follower, "_train_step", step)
        with pytest.raises(Preempted if kind == "SIGTERM" else KeyboardInterrupt):
            fit(config, shards, trained)
    fit(config, shards, trained, resume=True)
    assert lines(tmp_path / "run") == lines(calm)


def test_a_shard_that_is_trained_on_may_be_removed_though_the_run_was_stopped_at_its_end(
    tiny_data: Path, tmp_path: Path, calm: Path, trained: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, arrived = config_for(tiny_data, tmp_path / "run"), tmp_path / "shards"
    shutil.copytree(shards, arrived)
    original = follow_module.Follower._train_step
    last = lines(calm)[0]["step"] + 3

    def step(self: Any, batches: Any, stream: Any) -> bool:
        if self.progress.step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, stream)

    with monkeypatch.context() as patch:
        patch.setattr(follow_module.Follower, "_train_step", step)
        with pytest.raises(Preempted, match=f"at step {last + 1}"):
            fit(config, arrived, trained)
    min(arrived.glob("*.parquet")).unlink()
    fit(config, arrived, trained, resume=True)
    assert lines(tmp_path / "run") == lines(calm)


def test_a_kill_between_measuring_and_training_measures_once(
    tiny_data: Path, tmp_path: Path, calm: Path, trained: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_data, tmp_path / "run")
    original = follow_module.Follower._train

    def training(self: Any, name: str, rows: Any) -> None:
        if self.progress.epoch == 1:
            raise KeyboardInterrupt
        original(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(follow_module.Follower, "_train", training)
        with pytest.raises(KeyboardInterrupt):
            fit(config, shards, trained)
    assert len(lines(tmp_path / "run", "progressive")) == 2
    fit(config, shards, trained, resume=True)
    assert lines(tmp_path / "run") == lines(calm)


@pytest.mark.slow
def test_shards_that_come_later_are_waited_for(
    tiny_data: Path, tmp_path: Path, calm: Path, trained: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, then SIGTERM while nothing is there, then the rest and the end file."""
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list_shards(shards)
    config = config_for(tiny_data, tmp_path / "run")
    shutil.copy(shards / names[0], folder)
    original = follow_module.Follower._look
    waits: list[float] = []

    def look(self: Any, waited: float) -> tuple[str, str]:
        found = original(self, waited)
        if found == ("wait", ""):
            waits.append(waited)
            if len(waits) == 2:
                shutil.copy(shards / names[1], folder / ".copy")
                os.rename(folder / ".copy", folder / names[1])
            if len(waits) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(follow_module.Follower, "_look", look)
        with pytest.raises(Preempted, match=r"stopped by SIGTERM at step \d+; continue with --resume"):
            fit(config, folder, trained)
    assert len(lines(tmp_path / "run", "progressive")) == 2
    (folder / names[0]).unlink()  # what is trained on may go
    shutil.copy(shards / names[2], folder)
    fit(config, folder, trained, resume=True, idle=1.0)
    assert lines(tmp_path / "run") == lines(calm)


def test_what_is_wrong_ends_with_one_line_and_loses_nothing(
    tiny_data: Path, tmp_path: Path, calm: Path, trained: Path, shards: Path
) -> None:
    folder, run = tmp_path / "shards", tmp_path / "run"
    folder.mkdir()
    config = config_for(tiny_data, run)
    names = list_shards(shards)
    shutil.copy(shards / names[0], folder)
    (folder / names[1]).write_bytes((shards / names[1]).read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"{names[1]}: truncated or damaged .*; write the shard again and --resume"):
        fit(config, folder, trained)
    shutil.copy(shards / names[1], folder)
    shutil.copy(shards / names[0], folder / "00001b.parquet")
    with pytest.raises(
        DataError, match=rf"00001b.parquet row 0: timestamp is \d+, must be later than .*{names[1]} ends"
    ):
        fit(config, folder, trained, resume=True)
    os.rename(folder / "00001b.parquet", folder / "00000b.parquet")
    with pytest.raises(DataError, match=rf"00000b.parquet: came after {names[1]}, which is trained on already"):
        fit(config, folder, trained, resume=True)
    (folder / "00000b.parquet").unlink()
    shutil.copy(shards / names[2], folder)
    (folder / END_FILE).touch()
    fit(config, folder, trained, resume=True)
    assert lines(run) == lines(calm)


def test_a_shard_or_memory_that_changed_under_a_checkpoint_is_refused(
    tiny_data: Path, tmp_path: Path, trained: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    config = config_for(tiny_data, tmp_path / "run")
    original = follow_module.Follower._train_step

    def step(self: Any, batches: Any, stream: Any) -> bool:
        if self.progress.epoch == 1 and self.progress.row > 64:
            raise KeyboardInterrupt
        return original(self, batches, stream)

    with monkeypatch.context() as patch:
        patch.setattr(follow_module.Follower, "_train_step", step)
        with pytest.raises(KeyboardInterrupt):
            fit(config, folder, trained)
    name = list_shards(folder)[1]
    shutil.copy(folder / list_shards(folder)[2], folder / name)
    with pytest.raises(DataError, match=rf"{name}: is not the file of which 96 rows are trained on"):
        fit(config, folder, trained, resume=True)
    shutil.copy(shards / name, folder)
    (memory,) = (tmp_path / "run" / "recent_events").glob("*.npz")
    memory.write_bytes(memory.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00000001.npz: missing or damaged, and step \d+ needs it"):
        fit(config, folder, trained, resume=True)


def test_new_users_strange_items_and_single_rows_are_trained_on(tiny_data: Path, tmp_path: Path) -> None:
    ids = PreparedData.open(tiny_data).items["raw_id"].to_pylist()
    folder = tmp_path / "shards"
    for number, item in enumerate((ids[1], "strange", ids[-1])):
        columns = {"user_id": np.array(["new"]), "item_id": np.array([item]), "timestamp": np.array([10**10 + number])}
        write_shard(folder / f"{number}.parquet", {**columns, "label": np.array([number % 2], dtype=np.int8)})
    (folder / END_FILE).touch()
    run = tmp_path / "run"
    fit(config_for(tiny_data, run), folder)
    assert [line["samples"] for line in lines(run, "train")] == [1, 2, 3]
    assert [line["auc"] for line in lines(run, "progressive")] == [None] * 3
    assert lines(run, "progressive")[-1]["cumulative_ne"] > 0.0


def test_a_run_cannot_start_from_itself(tiny_data: Path, trained: Path, shards: Path) -> None:
    with pytest.raises(ConfigError, match="is --run itself"):
        fit(config_for(tiny_data, trained), shards, trained)


@pytest.mark.slow
def test_the_commands_shard_and_follow(tiny_data: Path, tmp_path: Path, calm: Path, trained: Path) -> None:
    out, run = tmp_path / "shards", tmp_path / "run"
    assert em3(["shard", str(tiny_data), "--out", str(out), "--count", "3"]) == 0
    arguments = ["follow", "--config", str(trained / "config.yaml"), "--run", str(run), "--shards", str(out)]
    assert em3([*arguments, "--start_from", str(trained)]) == 0
    assert lines(run) == lines(calm)
    assert json.loads((run / "training.json").read_text())["samples"] == ROWS
    assert em3(["evaluate", str(run)]) == 0, "the last weights are those that other commands use"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["validate:0:2", "optimizer:0:7", "save.progress:0:3", "save.done:0:4"])
def test_a_stream_killed_at_a_place_resumes_exactly(
    tmp_path: Path, calm: Path, trained: Path, shards: Path, place: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["torchrec_em3", "follow", "--config", str(trained / "config.yaml"), "--shards", str(shards)]
    command += ["--run_folder", str(run), "--start_from", str(trained)]
    assert finish(command, log, f"{place}:kill") == -signal.SIGKILL
    assert finish([*command, "--resume"], log) == 0, log.read_text()
    assert lines(run) == lines(calm)


def _follow_or_stop(config: Config, shards: Path, trained: Path, resume: bool, stop_at: int) -> str:
    """Follow on this rank; rank 1 alone sends itself SIGTERM before step `stop_at`."""
    original = follow_module.Follower._train_step

    def step(self: Any, batches: Any, stream: Any) -> bool:
        if self.progress.step == stop_at - 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, stream)

    follow_module.Follower._train_step = step  # type: ignore[method-assign]
    try:
        fit(config, shards, trained, resume=resume)
    except Preempted as stopped:
        return str(stopped)
    finally:
        follow_module.Follower._train_step = original  # type: ignore[method-assign]
    return "done"


def _both_ways(calm: Config, broken: Config, shards: Path, trained: Path, stop_at: int) -> list[str]:
    return [
        _follow_or_stop(calm, shards, trained, False, 0),
        _follow_or_stop(broken, shards, trained, False, stop_at),
        _follow_or_stop(broken, shards, trained, True, 0),
    ]


@pytest.mark.slow
def test_two_ranks_stop_together_resume_exactly_and_train_as_one(
    tiny_data: Path, tmp_path: Path, shards: Path, trained: Path
) -> None:
    calm, broken, single = (config_for(tiny_data, tmp_path / name) for name in ("calm", "broken", "single"))
    # The same global batch on one rank and on two; no chance, which differs from rank to rank.
    model = dataclasses.replace(calm.model, unknown_id_rate=0.0)
    single = dataclasses.replace(single, model=model)
    calm, broken = (
        dataclasses.replace(config, model=model, loader=LoaderConfig(batch_size=16, max_history=10))
        for config in (calm, broken)
    )
    stop_at = json.loads((trained / "training.json").read_text())["best_step"] + 6
    odd = tmp_path / "odd"
    for name in list_shards(shards):  # two ranks then fill up the last step of each
        table = pq.read_table(shards / name).slice(1)
        write_shard(odd / name, {column: table[column] for column in table.column_names})
    (odd / END_FILE).touch()
    said = run_ranks(2, _both_ways, calm, broken, odd, trained, stop_at, timeout=240)
    stopped = f"stopped by SIGTERM at step {stop_at}"
    assert all(answer[0] == answer[2] == "done" and stopped in answer[1] for answer in said)
    assert lines(Path(broken.run)) == lines(Path(calm.run))
    fit(single, odd, trained)
    for two, one in zip(lines(Path(calm.run), "progressive"), lines(Path(single.run), "progressive"), strict=True):
        assert two["n"] == one["n"]
        assert two["logloss"] == pytest.approx(one["logloss"], rel=1e-5)
    trained_on = ("rank_loss", "alignment_loss", "samples")
    for two, one in zip(lines(Path(calm.run), "train"), lines(Path(single.run), "train"), strict=True):
        assert [two[name] for name in trained_on] == pytest.approx([one[name] for name in trained_on], rel=1e-5)
