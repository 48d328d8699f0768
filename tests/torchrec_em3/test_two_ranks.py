"""Whole runs on two ranks: stopped, resumed, and evaluated on one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from tests.stopped_training import fit
from torchrec_em3.build import build_model, build_sharded, open_data
from torchrec_em3.commands import evaluate
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import EM3Error
from torchrec_em3.evaluate import evaluate_split
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.sharding import Cluster, make_plan

pytestmark = pytest.mark.slow


def config_for(data: Path, run: Path) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3, encode_fraction=0.5),
        train=TrainConfig(epochs=2, log_every=1, patience=5),
    )


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


def _refused(config: Config, kind: str) -> str:
    """Return what this rank says of what rank 0 alone can see."""
    load_builtin_parts()
    with process_group() as ranks:
        data = open_data(config)
        try:
            if kind == "plan":
                make_plan(
                    build_model(config, data), config, Cluster(world_size=2, local_world_size=2, ddr_gb=1e-6), ranks
                )
            sharded = build_sharded(config, data, ranks)
            with torch.no_grad():
                next(sharded.model.ranker.parameters()).fill_(torch.nan)
            evaluate_split(sharded, data, "validation", config, ranks)
        except EM3Error as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [("plan", "ConfigError: no sharding plan for 2 x cpu"), ("logit", "NumericError: logit nan at row")],
)
def test_what_rank_0_alone_sees_is_said_by_both(
    gang: Gang, tiny_data: Path, tmp_path: Path, kind: str, message: str
) -> None:
    said = gang.run(_refused, resolve_parts(config_for(tiny_data, tmp_path / "run")), kind)
    assert said[0] == said[1]
    assert said[0].startswith(message)


def test_a_run_of_two_ranks_is_evaluated_on_one(gang: Gang, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    expected = gang.run(fit, config_for(tiny_data, run), False)[0]["test"]
    evaluate.main([str(run)])
    found = json.loads((run / "summary.json").read_text())["test"]
    for name in ("auc", "gauc", "ne", "logloss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert found["n"] == expected["n"]
