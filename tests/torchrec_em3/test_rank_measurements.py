"""What ranks took, beside their plan: the bytes of their shards, their peaks, the times of their steps."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from tests.stopped_training import fit
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import NumericError
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.plan_measured import read_measured
from torchrec_em3.process_group import process_group
from torchrec_em3.rank_measurements import StepTimes, table_bytes
from torchrec_em3.training_steps import TrainingSteps


def config_for(data: Path, run: Path, **embeddings: Any) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3),
        embeddings=EmbeddingConfig(**embeddings),
        train=TrainConfig(epochs=1, patience=5),
    )


def plan_of(run: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return plan


def check(run: Path, world_size: int) -> None:
    plan = plan_of(run)
    assert [taken["rank"] for taken in plan["measured"]] == list(range(world_size))
    for rank, taken in zip(plan["ranks"], plan["measured"], strict=True):
        assert taken["table_bytes"] == rank["table_bytes"]
        assert taken["peak_rss_bytes"] > 50 * 2**20
        assert taken["peak_device_bytes"] is None
        assert taken["step_ms"] >= max(taken["loading_ms"], taken["computing_ms"]) > 0
    held = sum(taken["table_bytes"] for taken in plan["measured"])
    assert held == sum(shard["table_bytes"] for table in plan["tables"] for shard in table["shards"]) > 0
    assert "Planned and measured" in (run / "plan.txt").read_text()
    table = read_measured(run)
    assert table is not None
    assert len(table.rows) == world_size


@pytest.mark.parametrize(
    ("optimizer", "precision", "sharding"),
    [
        ("rowwise_adagrad", "fp32", "row_wise"),
        ("rowwise_adagrad", "fp16", "auto"),
        ("adagrad", "fp32", "table_wise"),
        ("sgd", "fp32", "auto"),
        ("rowwise_adagrad", "fp32", "column_wise"),
    ],
)
def test_planned_and_held_tables_are_of_one_size(
    tiny_data: Path, optimizer: Any, precision: Any, sharding: Any
) -> None:
    config = resolve_parts(config_for(tiny_data, Path(), optimizer=optimizer, precision=precision, sharding=sharding))
    with process_group() as ranks:
        sharded = build_sharded(config, open_data(config), ranks)
        (planned,) = sharded.plan.as_dict()["ranks"]
        assert table_bytes(sharded.module) == planned["table_bytes"] > 0


def test_medians_are_over_the_steps_and_their_parts() -> None:
    times = StepTimes()
    assert times.medians()["step_ms"] is None
    for whole, loading in ((1.0, 0.5), (2.0, 0.25), (9.0, 8.0)):
        times.add(whole, loading, processor=0.125)
    expected = {"steps": 3, "step_ms": 2e3, "loading_ms": 500.0, "computing_ms": 1e3, "processor_ms": 125.0}
    assert times.medians() == expected


def test_one_rank_records_what_it_took_also_when_it_is_stopped(tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_data, tmp_path / "run")
    assert "stopped by SIGTERM" in fit(config, False, 4)
    check(tmp_path / "run", world_size=1)
    steps = [taken["steps"] for taken in plan_of(tmp_path / "run")["measured"]]
    assert steps == [4]


def test_an_error_is_told_and_leaves_what_rank_0_took(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    original, calls = TrainingSteps.run, []

    def run(self: TrainingSteps, *arguments: Any) -> bool:
        calls.append(1)
        if len(calls) == 3:
            for weight in self._sharded.model.ranker.parameters():
                weight.data.fill_(math.nan)
        return original(self, *arguments)

    monkeypatch.setattr(TrainingSteps, "run", run)
    with pytest.raises(NumericError, match="at step 3"):
        fit(config_for(tiny_data, tmp_path / "run"))
    assert [taken["steps"] for taken in plan_of(tmp_path / "run")["measured"]] == [2]


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    with Gang(2, timeout=240) as two:
        yield two


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0, 4])
def test_two_ranks_record_what_each_took(gang: Gang, tiny_data: Path, tmp_path: Path, stop_at: int) -> None:
    gang.run(fit, config_for(tiny_data, tmp_path / "run", sharding="table_wise"), False, stop_at)
    check(tmp_path / "run", world_size=2)
    plan = plan_of(tmp_path / "run")
    assert len({rank["table_bytes"] for rank in plan["ranks"]}) == 2, "table-wise shards differ"


def test_a_median_takes_few_steps_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_em3.rank_measurements.KEPT_STEPS", 2)
    times = StepTimes()
    for whole in (9.0, 1.0, 1.0):
        times.add(whole, 0.0, 0.0)
    assert times.medians()["step_ms"] == 1e3
