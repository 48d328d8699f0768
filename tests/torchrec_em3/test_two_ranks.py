"""Whole runs on two ranks: stopped, resumed, and evaluated on one."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import tests.tiny_parts  # noqa: F401
from tests.gang import Gang
from torchrec_em3 import train as train_module
from torchrec_em3.commands import evaluate
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import Preempted
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group

pytestmark = pytest.mark.slow


def config_for(data: Path, run: Path) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, encode_fraction=0.5),
        train=TrainConfig(epochs=2, log_every=1, patience=5),
    )


def fit(config: Config, resume: bool, stop_at: int = 0) -> dict[str, Any] | str:
    """Train; if `stop_at`, send SIGTERM to rank 1 alone before that step."""
    original = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        if self.progress.step == stop_at - 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    train_module.Trainer._train_step = step  # type: ignore[method-assign]
    try:
        with process_group() as ranks:
            return train(resolve_parts(config), ranks, resume=resume)
    except Preempted as stopped:
        return str(stopped)
    finally:
        train_module.Trainer._train_step = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    with Gang(2, timeout=240) as two:
        yield two


def test_a_stop_on_one_rank_stops_both_and_resume_goes_on_exactly(gang: Gang, tiny_data: Path, tmp_path: Path) -> None:
    calm, broken = config_for(tiny_data, tmp_path / "calm"), config_for(tiny_data, tmp_path / "broken")
    expected = gang.run(fit, calm, False)[0]
    said = gang.run(fit, broken, False, 6)
    assert all("stopped by SIGTERM at step 6" in str(line) for line in said)
    resumed = gang.run(fit, broken, True)[0]
    lines = [(Path(config.run) / "metrics.jsonl").read_text() for config in (calm, broken)]
    assert lines[0] == lines[1]
    assert resumed["test"] == expected["test"]
    assert expected["world_size"] == 2


def test_a_run_of_two_ranks_is_evaluated_on_one(gang: Gang, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    expected = gang.run(fit, config_for(tiny_data, run), False)[0]["test"]
    evaluate.main([str(run)])
    found = json.loads((run / "summary.json").read_text())["test"]
    for name in ("auc", "gauc", "ne", "logloss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert found["n"] == expected["n"]
