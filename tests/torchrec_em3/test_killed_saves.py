"""Two ranks save and one is killed, at a byte of a file or between two files: the checkpoint before is taken."""

import random
import resource
import shutil
import signal
from pathlib import Path

import pytest

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import GangError, run_ranks
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.checkpoint_manifest import read_manifest, verify
from torchrec_em3.config import Config, ModelConfig
from torchrec_em3.faults import VARIABLE
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.process_group import process_group

PLACES = [["save.start", "save.shard", "save.metadata", "save.progress", "save.manifest"], ["save.start", "save.shard"]]
"""By rank, those before the folder has its final name."""
SECONDS = 280.0


def save(data: Path, folder: Path, step: int, rank: int, size: int) -> None:
    """Save a model whose values are those of no other step; `rank` dies when a file of its own reaches `size` bytes."""
    load_builtin_parts()
    config = Config(data=str(data), seed=step, model=ModelConfig(embedding_dim=8, **WHOLE_EM3))
    with process_group() as ranks:
        sharded = build_sharded(config, open_data(config), ranks)
        if ranks.rank == rank and size:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, so that a full disk is an error
        CheckpointFolder(folder, ranks).save(step, sharded, {})


@pytest.fixture(scope="module")
def saved(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint, that of step 1."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(2, save, tiny_data, folder, 1, 0, 0, timeout=SECONDS)
    return folder


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("number", [*range(2), *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 50))])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    tiny_data: Path, tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder, draw, size = tmp_path / "checkpoints", random.Random(number), 0
    shutil.copytree(saved, folder)
    files, rank = read_manifest(folder / "step-1"), draw.randrange(2)
    if number % 2:
        others = f"__{1 - rank}_" if rank == 0 else (f"__{1 - rank}_", ".metadata", "progress.json")
        own = [found.size for name, found in files.items() if not name.startswith(others)]
        size, death = draw.randrange(1, max(own)), signal.SIGXFSZ
    else:
        monkeypatch.setenv(VARIABLE, f"{draw.choice(PLACES[rank])}:{rank}:1:kill")
        death = signal.SIGKILL
    with pytest.raises(GangError) as caught:
        run_ranks(2, save, tiny_data, folder, 2, rank, size, timeout=SECONDS)
    assert caught.value.errors[rank] == f"process died with exit code {-death}"
    assert (folder / ".step-2.tmp").is_dir(), "the save had begun"
    with process_group() as one:
        assert CheckpointFolder(folder, one).newest_good() == 1
    assert read_manifest(folder / "step-1") == files
    verify(folder / "step-1", files)
