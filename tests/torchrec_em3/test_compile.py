"""A compiled ranker gives the same losses, keeps its parameters' names, and says what it needs."""

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.whole_em3 import WHOLE_EM3
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import process_group


def config_for(data: Path, compiled: bool) -> Config:
    return resolve_parts(
        Config(
            data=str(data),
            loader=LoaderConfig(batch_size=128, max_history=10),
            model=ModelConfig(embedding_dim=8, **WHOLE_EM3, ranker_options={"hidden": (16,)}),
            train=TrainConfig(compile_ranker=compiled),
        )
    )


def losses_and_names(data: Path, compiled: bool) -> tuple[list[float], list[str]]:
    config = config_for(data, compiled)
    with process_group() as ranks:
        sharded = build_sharded(config, open_data(config), ranks)
        pipeline = CheckedPipeline(sharded, ranks)
        batches = iter(BatchStream(open_data(config), "train", batch_size=128, max_history=10))
        losses = [float(pipeline.progress(batches).metrics["loss"]) for _ in range(4)]
        return losses, sorted(sharded.module.state_dict())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_same_losses_and_names(tiny_data: Path) -> None:
    plain, names = losses_and_names(tiny_data, compiled=False)
    compiled, compiled_names = losses_and_names(tiny_data, compiled=True)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert compiled_names == names


def test_says_what_it_needs(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PATH", "/nonexistent")
    config = config_for(tiny_data, compiled=True)
    with process_group() as ranks, pytest.raises(ConfigError, match=r"compile_ranker needs a C\+\+ compiler"):
        build_sharded(config, open_data(config), ranks)
