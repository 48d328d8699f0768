"""Checkpoints that are damaged, planted or half written: refused, set aside, and never in the way of a good one."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from torchrec_em3 import checkpoint as checkpoint_module
from torchrec_em3 import cli
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_manifest import digest, read_manifest, write_manifest
from torchrec_em3.checkpoint_metadata import ALLOWED, read_metadata
from torchrec_em3.checkpoint_saver import CheckpointSaver
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import CheckpointError
from torchrec_em3.faults import VARIABLE
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.run_folder import read_run
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.table_steps import set_table_steps, table_steps

DAMAGES = ["flip", "truncate", "delete", "metadata", "no_manifest", "torn_manifest", "empty_manifest"]


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 5, 10, 15 and, validated and best, 18."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = Config(
        data=str(tiny_data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3),
        train=TrainConfig(epochs=1, log_every=1, checkpoint_every=5, keep_checkpoints=50),
    )
    with process_group() as ranks:
        train(resolve_parts(config), ranks)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    return copy


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as one:
        yield one


def sharded_model(run: Path, ranks: Ranks) -> ShardedModel:
    from torchrec_em3.run_folder import read_run

    config = resolve_parts(read_run(run))
    return build_sharded(config, open_data(config), ranks)


def resume(run: Path) -> list[str]:
    return ["train", "--config", str(run / "config.yaml"), "--run", str(run), "--resume"]


def flip_bit(path: Path, place: float = 0.5, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)


def damage(folder: Path, kind: str) -> None:
    shard = folder / "__0_0.distcp"
    if kind == "flip":
        flip_bit(shard)
    elif kind == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "delete":
        shard.unlink()
    elif kind == "metadata":
        flip_bit(folder / ".metadata")
    elif kind == "no_manifest":
        (folder / "manifest.json").unlink()
    elif kind == "torn_manifest":
        (folder / "manifest.json").write_text('{"format_version": 1, "files": {')
    else:
        write_manifest(folder, {})


def plant(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and make the manifest match."""
    (folder / name).write_bytes(content)
    write_manifest(folder, read_manifest(folder) | {name: digest(folder / name)})


@pytest.mark.fault
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(run: Path, ranks: Ranks, kind: str) -> None:
    folder = CheckpointFolder(run / "checkpoints", ranks)
    damage(folder.path(18), kind)
    damaged = sorted(path.name for path in folder.path(18).iterdir())
    assert folder.newest_good() == 15
    assert folder.steps() == [5, 10, 15]
    assert sorted(path.name for path in (run / "checkpoints/broken-step-18").iterdir()) == damaged


@pytest.mark.parametrize("kind", DAMAGES)
def test_no_tensor_of_a_broken_checkpoint_is_used(trained: Path, tmp_path: Path, ranks: Ranks, kind: str) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    folder = CheckpointFolder(tmp_path / "checkpoints", ranks)
    damage(folder.path(15), kind)
    sharded = sharded_model(trained, ranks)
    before = {name: value.detach().clone() for name, value in sharded.model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"step-15/.*; use another checkpoint$"):
        folder.load(15, sharded)
    for name, value in sharded.model.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.fault
@pytest.mark.parametrize(
    "number", [*range(8), *(pytest.param(n, marks=[pytest.mark.long, pytest.mark.slow]) for n in range(8, 200))]
)
def test_a_flipped_bit_is_refused_before_the_model_is_touched(run: Path, ranks: Ranks, number: int) -> None:
    """Any bit of any file, those of the manifest too."""
    folder, draw, untouched = CheckpointFolder(run / "checkpoints", ranks), random.Random(number), object()
    path = draw.choice(sorted(folder.path(18).iterdir()))
    flip_bit(path, draw.random(), draw.randrange(8))
    with pytest.raises(CheckpointError, match=r"checkpoints/step-18/"):
        folder.load(18, untouched)  # type: ignore[arg-type]


class Sentinel:
    """Unpickled without care, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.fault
def test_planted_pickles_are_not_executed(run: Path, ranks: Ranks, tmp_path: Path) -> None:
    folder, sentinel = CheckpointFolder(run / "checkpoints", ranks), tmp_path / "executed"
    plant(folder.path(18), ".metadata", pickle.dumps(Sentinel(sentinel)))
    with pytest.raises(
        CheckpointError, match=r"step-18/.metadata is refused: it names posix.mkdir, which no checkpoint"
    ):
        folder.load(18, sharded_model(run, ranks))
    assert not sentinel.exists()
    assert folder.newest_good() == 15
    pickle.loads((folder.folder / "broken-step-18/.metadata").read_bytes())
    assert sentinel.exists(), "the planted pickle is harmful"


@pytest.mark.fault
def test_a_value_that_torch_would_unpickle_is_refused(run: Path, ranks: Ranks) -> None:
    """torch reads values that are not tensors by pickle, from the shards: the metadata must not say there are any."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    folder = CheckpointFolder(run / "checkpoints", ranks)
    metadata = read_metadata(folder.path(18))
    metadata.state_dict_metadata["random/0/cpu"] = BytesStorageMetadata()
    plant(folder.path(18), ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"it names torch.distributed.checkpoint.metadata.BytesStorageMetadata"):
        folder.load(18, sharded_model(run, ranks))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({}), "is refused: it holds a dict in place of metadata"),
        (b"no pickle", "cannot be read: UnpicklingError"),
        (pickle.dumps(eval), "is refused: it names builtins.eval"),
    ],
)
def test_metadata_that_is_none_is_refused(run: Path, content: bytes, said: str) -> None:
    plant(run / "checkpoints/step-18", ".metadata", content)
    with pytest.raises(CheckpointError, match=said):
        read_metadata(run / "checkpoints/step-18")


@pytest.mark.fault
def test_metadata_may_not_point_outside_the_manifest(run: Path, ranks: Ranks) -> None:
    folder = CheckpointFolder(run / "checkpoints", ranks)
    metadata = read_metadata(folder.path(18))
    next(iter(metadata.storage_data.values())).relative_path = "../step-5/__0_0.distcp"
    plant(folder.path(18), ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"refers to ../step-5/__0_0.distcp, not in the manifest"):
        folder.load(18, sharded_model(run, ranks))


def test_the_allow_list_is_what_a_real_checkpoint_names(run: Path) -> None:
    named: set[tuple[str, str]] = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    with (run / "checkpoints/step-18/.metadata").open("rb") as file:
        Recorder(file).load()
    types = {("torch", name) for module, name in named if isinstance(getattr(torch, name, None), torch.dtype)}
    assert named - types == ALLOWED


def test_evaluate_passes_over_a_broken_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(run / "checkpoints/step-18/__0_0.distcp")
    assert cli.run(["evaluate", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text())["best_step"] == 15
    said = [line for line in capsys.readouterr().err.splitlines() if "set aside" in line]
    assert len(said) == 1
    assert "step-18/__0_0.distcp does not match its SHA-256" in said[0]
    assert said[0].endswith("the checkpoint is set aside as broken-step-18")


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_exit_code_when_no_checkpoint_is_left(run: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 15, 18):
        (run / f"checkpoints/step-{step}/manifest.json").unlink()
    assert cli.run(["evaluate", str(run)] if command == "evaluate" else resume(run)) == 4
    assert f"em3 {command}: no checkpoint is left in {run}/checkpoints: all 4 are broken" in capsys.readouterr().err
    assert len(list((run / "checkpoints").glob("broken-step-*"))) == 4


def test_resume_without_the_best_checkpoint_chooses_anew(run: Path) -> None:
    """The best one is lost at step 18; a validation made up as the best of all time must not outlive its weights."""
    folder = run / "checkpoints/step-15"
    progress = json.loads((folder / "progress.json").read_text())
    plant(folder, "progress.json", json.dumps(progress | {"best_step": 10, "best_value": 1.0}).encode())
    shutil.rmtree(run / "checkpoints/step-18")
    flip_bit(run / "checkpoints/step-10/__0_0.distcp")
    assert cli.run(resume(run)) == 0
    assert json.loads((run / "summary.json").read_text())["best_step"] == 18


def test_a_checkpoint_of_another_format_is_refused_and_left_in_place(run: Path, ranks: Ranks) -> None:
    folder = CheckpointFolder(run / "checkpoints", ranks)
    path = folder.path(18) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match=r"step-18/manifest.json has format version 2, this program reads 1"):
        folder.newest_good()
    assert folder.steps() == [5, 10, 15, 18]


def test_retention_keeps_the_best_and_the_last_known_to_be_good(run: Path, ranks: Ranks) -> None:
    folder = CheckpointFolder(run / "checkpoints", ranks)
    assert folder.is_good(10)
    (folder.folder / ".step-7.tmp").mkdir()
    (folder.path(18) / "manifest.json").unlink()
    folder.retain({5}, 1)
    assert folder.steps() == [5, 10, 18], "18 was never verified, so 10 stays"
    assert not (folder.folder / ".step-7.tmp").exists()


def test_retention_keeps_one_to_fall_back_on_besides_the_best(run: Path, ranks: Ranks) -> None:
    folder = CheckpointFolder(run / "checkpoints", ranks)
    assert folder.steps() == [5, 10, 15, 18]
    folder.retain({18}, 1)
    assert folder.steps() == [15, 18], "the newest is the best"
    folder.retain({15}, 1)
    assert folder.steps() == [15, 18]


def test_a_generator_that_the_checkpoint_does_not_know_is_left_as_it_is(
    run: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, for a run that began on a CPU."""
    own = checkpoint_module._random_state
    more = {"random/0/cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(checkpoint_module, "_random_state", lambda ranks: own(ranks) | more)
    config = read_run(run)
    sharded = build_sharded(config, open_data(config), ranks)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert CheckpointFolder(run / "checkpoints", ranks).load(18, sharded)["step"] == 18
    assert not torch.get_rng_state().equal(before), "that of the CPU is there"


def test_the_steps_that_the_tables_optimizers_count_are_kept(run: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = read_run(run)
    sharded, fresh = (build_sharded(config, open_data(config), ranks) for _ in range(2))
    CheckpointFolder(run / "checkpoints", ranks).load(18, sharded)
    set_table_steps(sharded, 7)
    folder = CheckpointFolder(tmp_path / "checkpoints", ranks)
    with CheckpointSaver(folder, ranks, background=False, keep=1) as saver:
        saver.save(3, sharded, {}, best_step=3)
    assert table_steps(fresh, ranks) == 0
    folder.load(3, fresh)
    assert table_steps(fresh, ranks) == 7


@pytest.mark.fault
@pytest.mark.parametrize("place", ["save.start", "save.shard", "save.metadata", "save.progress", "save.manifest"])
def test_a_full_disk_keeps_the_earlier_checkpoint(
    run: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (15, 18):
        shutil.rmtree(run / f"checkpoints/step-{step}")
    monkeypatch.setenv(VARIABLE, f"{place}:0:1:full")
    assert cli.run(resume(run)) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("em3 train:")]
    assert len(said) == 1
    assert said[0].startswith(f"em3 train: cannot write checkpoint {run}/checkpoints/step-15: ")
    assert said[0].endswith("[Errno 28] No space left on device; earlier checkpoints are kept")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-5"]
