"""Whole runs with tables of raw ids: resumed exactly, on one rank and on two; rows that change hands begin anew."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from tests.stopped_training import fit
from torchrec_em3.build import build_model, build_sharded, open_data
from torchrec_em3.commands import evaluate
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig, TableConfig, TrainConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.sharding import Cluster, estimate
from torchrec_em3.trained_run import open_trained_run

MANAGED = {
    "user_table": {"ids": "managed", "rows": 24, "eviction": "lru"},
    "item_table": {"ids": "managed", "rows": 60, "eviction": "distance_lfu"},
}
HASHED = {"user_table": {"ids": "hashed", "rows": 24}, "item_table": {"ids": "hashed", "rows": 60}}


def config_for(data: Path, run: Path, tables: dict[str, Any] = MANAGED, **training: Any) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3, unknown_id_rate=0.2),
        embeddings=EmbeddingConfig(tables=tables),
        train=TrainConfig(epochs=1, log_every=1, patience=5, checkpoint_every=5, keep_checkpoints=50, **training),
    )


def final_state(run: Path) -> dict[str, torch.Tensor]:
    with process_group() as ranks:
        state = open_trained_run(run, ranks).sharded.module.state_dict()
        return {
            name: (value.local_shards()[0].tensor if hasattr(value, "local_shards") else value).clone()
            for name, value in state.items()
        }


@pytest.mark.parametrize("background", [False, True])
def test_a_resumed_run_has_the_very_same_rows_and_weights(tiny_data: Path, tmp_path: Path, background: bool) -> None:
    calm, broken = (config_for(tiny_data, tmp_path / name, async_checkpoints=background) for name in ("calm", "broken"))
    expected = fit(calm)
    assert "at step 8" in fit(broken, stop_at=8)
    assert fit(broken, resume=True)["test"] == expected["test"]
    lines = [(Path(config.run) / "metrics.jsonl").read_text() for config in (calm, broken)]
    assert lines[0] == lines[1]
    states = [final_state(Path(config.run)) for config in (calm, broken)]
    assert sum("_mch_sorted_raw_ids" in name for name in states[0]) == 2
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_hashed_run_trains_and_is_evaluated(tiny_data: Path, tmp_path: Path) -> None:
    fit(config_for(tiny_data, tmp_path / "run", HASHED))
    state = final_state(tmp_path / "run")
    rows = {name.split(".")[-2]: len(value) for name, value in state.items() if name.endswith("_table.weight")}
    assert {"user_table": 24, "item_table": 60}.items() <= rows.items()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_row_that_changes_hands_begins_anew(tiny_data: Path, optimizer: str) -> None:
    config = config_for(tiny_data, Path(), {"user_table": {"ids": "managed", "rows": 4, "eviction": "lru"}})
    options = dataclasses.replace(config.embeddings, optimizer=optimizer)
    with process_group() as ranks:
        config = resolve_parts(dataclasses.replace(config, embeddings=options))
        users = build_sharded(config, open_data(config), ranks).model.users.by_id
        assert users is not None
        (kernel, _) = users.tables._table_to_tbe_and_index["user_table"]
        (weights,) = kernel.split_embedding_weights()
        states = [state for table in kernel.split_optimizer_states() for state in table]
        assert len(states) == (optimizer != "sgd")
        users(torch.tensor([100, 200, 300]))
        users(torch.tensor([100, 300]))
        for tensor in (weights, *states):
            tensor.fill_(7.0)
        with torch.no_grad():
            found, known = users(torch.tensor([400, 100, 0]))
        assert known.tolist() == [True, True, False]
        assert found[1].tolist() == found[2].tolist() == [7.0] * 8
        assert 0 < float(found[0].abs().max()) <= 0.5, "uniform in +-sqrt(1 / rows)"
        assert [int((tensor == 0).flatten(1).any(1).sum()) for tensor in map(_as_rows, states)] == [1] * len(states)
        assert weights[0].tolist() == [7.0] * 8


def _as_rows(state: torch.Tensor) -> torch.Tensor:
    return state.reshape(4, -1)


def test_new_ids_never_touch_the_row_of_unknown(tiny_data: Path, tmp_path: Path) -> None:
    """Without hidden IDs and with a row for everyone nothing is unknown, so row 0 stays as it was initialised."""
    tables = {name: {**spec, "rows": 200} for name, spec in MANAGED.items()}
    config = config_for(tiny_data, tmp_path / "run", tables)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unknown_id_rate=0.0))
    with process_group() as ranks:
        before = build_sharded(resolve_parts(config), open_data(config), ranks).module.state_dict()
        first = {name: value.local_shards()[0].tensor[0].clone() for name, value in before.items() if _is_table(name)}
    fit(config)
    after = final_state(tmp_path / "run")
    assert len(first) == 2
    for name, row in first.items():
        assert torch.equal(after[name][0], row), name
        assert not torch.equal(after[name][1], row)


def _is_table(name: str) -> bool:
    return name.endswith(("user_table.weight", "item_table.weight"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 5}, "rows is 5 with ids fixed, whose rows the data says"),
        ({"ids": "hashed"}, "rows is 0 with ids hashed, must be at least 2"),
        ({"ids": "hashed", "rows": 5, "eviction": "lru"}, "eviction is lru with ids hashed; only managed"),
        ({"ids": "managed", "rows": 5, "sharding": ("table_wise",)}, "managed ids is row_wise and fused"),
        ({"ids": "managed", "rows": 5, "kernels": ("fused_uvm_caching",)}, "managed ids is row_wise and fused"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TableConfig(**options)


def test_tables_that_cannot_have_raw_ids(tiny_data: Path) -> None:
    config = config_for(tiny_data, Path(), {"segment_table": {"ids": "hashed", "rows": 5}})
    with pytest.raises(ConfigError, match=r"segment_table: ids is hashed, which only user_table and item_table can be"):
        build_model(resolve_parts(config), open_data(config))


def test_rows_are_a_multiple_of_the_ranks(tiny_data: Path) -> None:
    config = resolve_parts(config_for(tiny_data, Path(), {"item_table": {"ids": "managed", "rows": 61}}))
    cluster = Cluster(world_size=2, local_world_size=2, device="cpu", hbm_gb=0.0, ddr_gb=8.0)
    with pytest.raises(ConfigError, match="item_table: rows is 61, must be a multiple of the 2 ranks"):
        estimate(build_model(config, open_data(config)), config, cluster)


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    with Gang(2, timeout=240) as two:
        yield two


@pytest.mark.slow
def test_two_ranks_resume_exactly_and_are_evaluated_on_one(gang: Gang, tiny_data: Path, tmp_path: Path) -> None:
    calm, broken = config_for(tiny_data, tmp_path / "calm"), config_for(tiny_data, tmp_path / "broken")
    expected = gang.run(fit, calm, False)[0]
    assert all("at step 6" in str(line) for line in gang.run(fit, broken, False, 6))
    assert gang.run(fit, broken, True)[0]["test"] == expected["test"]
    lines = [(Path(config.run) / "metrics.jsonl").read_text() for config in (calm, broken)]
    assert lines[0] == lines[1]
    evaluate.main([calm.run])
    found = json.loads((Path(calm.run) / "summary.json").read_text())["test"]
    for name in ("auc", "gauc", "ne", "logloss"):
        assert found[name] == pytest.approx(expected["test"][name], rel=1e-6)
