"""Two ranks with half the batch each do what one rank does with the whole: losses, tables, bank."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import process_group

pytestmark = pytest.mark.slow
GLOBAL_BATCH = 256
STEPS = 5


def set_by_row(tensor: ShardedTensor) -> None:
    """Give every table entry a value that depends only on its global row and column."""
    for shard in tensor.local_shards():
        rows, columns = (
            torch.arange(start, start + size, dtype=torch.float64)
            for start, size in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        )
        shard.tensor.data.copy_(torch.sin(rows[:, None] * 12.9898 + columns[None, :] * 78.233) * 0.1)


def local_rows(state: dict[str, Any]) -> dict[str, list[tuple[tuple[int, ...], np.ndarray]]]:
    """Return this rank's shards of every sharded tensor, with their offsets."""
    return {
        name: [(tuple(s.metadata.shard_offsets), s.tensor.detach().numpy().copy()) for s in value.local_shards()]
        for name, value in state.items()
        if isinstance(value, ShardedTensor)
    }


def train_steps(config: Config, world_size: int) -> dict[str, Any]:
    """Train a few steps and return this rank's losses, shards and dense weights."""
    load_builtin_parts()
    config = dataclasses.replace(
        config, loader=dataclasses.replace(config.loader, batch_size=GLOBAL_BATCH // world_size)
    )
    data = open_data(config)
    with process_group() as ranks:
        sharded = build_sharded(config, data, ranks)
        for name, value in sharded.module.state_dict().items():
            if isinstance(value, ShardedTensor) and "table" in name:
                set_by_row(value)
        for group in sharded.optimizer.param_groups:
            if (
                "eps" in group
            ):  # Adam turns the rounding of a gradient that should be 0 into a whole step; not with this one
                group["eps"] = 1e-3
        stream = BatchStream(
            data,
            "train",
            batch_size=config.loader.batch_size,
            max_history=config.loader.max_history,
            rank=ranks.rank,
            world_size=world_size,
        )
        pipeline = CheckedPipeline(sharded, ranks)
        batches = iter(stream)
        metrics = [pipeline.progress(batches).metrics for _ in range(STEPS)]
        state = sharded.module.state_dict()
        return {
            "loss": [float(step["loss"]) for step in metrics],
            "alignment": [float(step.get("alignment_loss", torch.zeros(()))) for step in metrics],
            "shards": local_rows(state),
            "dense": {
                name: p.detach().numpy()
                for name, p in state.items()
                if type(p) is torch.Tensor and p.is_floating_point()
            },
        }


def whole(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Put the ranks' shards together."""
    tables: dict[str, np.ndarray] = {}
    pieces: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for result in results:
        for name, shards in result["shards"].items():
            pieces.setdefault(name, []).extend(shards)
    for name, shards in pieces.items():
        shape = np.max([np.add(offset, piece.shape) for offset, piece in shards], axis=0)
        tables[name] = np.full(shape, np.nan, dtype=np.float32)
        for (row, *column), piece in shards:
            start = column[0] if column else 0
            tables[name][row : row + piece.shape[0], start : start + piece.shape[1]] = piece
    return tables


@pytest.fixture(scope="module")
def gangs() -> Iterator[tuple[Gang, Gang]]:
    with Gang(1, timeout=240) as one, Gang(2, timeout=240) as two:
        yield one, two


def config_for(tiny_data: Path, sharding: str, **model: Any) -> Config:
    return Config(
        data=str(tiny_data),
        loader=LoaderConfig(max_history=10),
        model=ModelConfig(
            **{**WHOLE_EM3, "embedding_dim": 8, "unknown_id_rate": 0.0, "alignment_weight": 0.5, **model}
        ),
        embeddings=EmbeddingConfig(sharding=sharding),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
@pytest.mark.parametrize("content", ["fusion_qformer", "none"])
def test_two_ranks_equal_one(gangs: tuple[Gang, Gang], tiny_data: Path, sharding: str, content: str) -> None:
    config = config_for(tiny_data, sharding, content=content)
    expected = train_both(gangs, config)
    if content != "none":
        assert any("pool" in name for name in expected), "the bank is compared too"


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_two_ranks_equal_one_by_features_of_events(
    gangs: tuple[Gang, Gang], tiny_features_data: Path, sharding: str
) -> None:
    expected = train_both(gangs, config_for(tiny_features_data, sharding, content="none"))
    assert {"mood_table", "device_table"} <= {part for name in expected for part in name.split(".")}


def train_both(gangs: tuple[Gang, Gang], config: Config) -> dict[str, np.ndarray]:
    """Train on one rank and on two, compare all, and return the tables."""
    one = gangs[0].run(train_steps, config, 1)
    two = gangs[1].run(train_steps, config, 2)
    assert np.mean([rank["loss"] for rank in two], axis=0) == pytest.approx(one[0]["loss"], rel=1e-6)
    assert np.mean([rank["alignment"] for rank in two], axis=0) == pytest.approx(one[0]["alignment"], rel=1e-6)
    expected, found = whole(one), whole(two)
    assert expected.keys() == found.keys()
    for name, table in expected.items():
        np.testing.assert_allclose(found[name], table, rtol=1e-4, atol=2e-6, err_msg=name)
    for name, weight in one[0]["dense"].items():
        np.testing.assert_allclose(two[0]["dense"][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(two[0]["dense"][name], two[1]["dense"][name], err_msg=name)
    assert config.model.content == "none" or min(one[0]["alignment"]) > 0
    return expected


@pytest.mark.parametrize("content", ["fusion_qformer", "concat"])
@pytest.mark.parametrize("history", ["lora_qformer", "shared", "none"])
def test_other_parts_run_on_two_ranks_as_on_one(
    gangs: tuple[Gang, Gang], tiny_data: Path, content: str, history: str
) -> None:
    """DDP also refuses parameters that a step leaves unused."""
    config = config_for(tiny_data, "row_wise", content=content, history=history, history_options={})
    one = gangs[0].run(train_steps, config, 1)
    two = gangs[1].run(train_steps, config, 2)
    assert np.mean([rank["loss"] for rank in two], axis=0) == pytest.approx(one[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(("content", "similarity"), [("fusion_qformer", "both"), ("frozen_pool", "statistics")])
def test_similarity_and_a_wider_bank_run_on_two_ranks_as_on_one(
    gangs: tuple[Gang, Gang], tiny_data: Path, content: str, similarity: str
) -> None:
    config = config_for(tiny_data, "row_wise", content=content, similarity=similarity)
    one = gangs[0].run(train_steps, config, 1)
    two = gangs[1].run(train_steps, config, 2)
    assert np.mean([rank["loss"] for rank in two], axis=0) == pytest.approx(one[0]["loss"], rel=1e-6)
    for name, weight in one[0]["dense"].items():
        np.testing.assert_allclose(two[0]["dense"][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)


def test_tables_learn(gangs: tuple[Gang, Gang], tiny_data: Path) -> None:
    """The comparison above would also pass if nothing were trained."""
    config = config_for(tiny_data, "row_wise")
    losses = gangs[1].run(train_steps, config, 2)[0]["loss"]
    assert losses[-1] < losses[0]
