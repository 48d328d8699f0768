"""A checkpoint is read by other numbers of ranks and other plans: every value arrives, and training goes on alike."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.planner.constants import MIN_CW_DIM

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.errors import CheckpointError
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import process_group
from torchrec_em3.sharding import ShardedModel

pytestmark = pytest.mark.slow
GLOBAL_BATCH = 128
WORLD_SIZES = (1, 2, 4, 2, 1)
PLANS = [
    ("rowwise_adagrad", ["table_wise", "row_wise", "row_wise", "table_wise", "row_wise"]),
    ("rowwise_adagrad", ["column_wise"] * 5),
    ("adagrad", ["table_wise", "row_wise", "column_wise", "row_wise", "column_wise"]),
]
"""Optimizer of the tables, and how these are sharded at each number of ranks."""
SMALL = ("age_group_table", "region_table")
"""Too few rows for each of four ranks to have one."""
Pieces = list[tuple[tuple[int, ...], np.ndarray]]


def pieces_by_name(sharded: ShardedModel) -> dict[str, Pieces]:
    """Return everything this rank holds of what a checkpoint saves, each piece with its place in the whole."""
    optimizer = sharded.optimizer.state_dict()["state"]
    state = {f"model/{name}": value for name, value in sharded.module.state_dict().items()}
    state |= {f"average/{name}": value for name, value in sharded.average.state_dict().items()}
    state |= {f"optimizer/{name}/{key}": value for name, part in optimizer.items() for key, value in part.items()}
    found: dict[str, Pieces] = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            found[name] = [
                (tuple(s.metadata.shard_offsets), s.tensor.detach().numpy().copy()) for s in value.local_shards()
            ]
        else:
            found[name] = [((0,) * value.dim(), value.detach().numpy().copy())]
    return found


def go(config: Config, folder: Path, load: int | None, steps: int, save: int | None) -> dict[str, Any]:
    """Build, load if asked, train a few steps, save if asked; return the losses and what this rank holds."""
    load_builtin_parts()
    with process_group() as ranks:
        loader = dataclasses.replace(config.loader, batch_size=GLOBAL_BATCH // ranks.world_size)
        config = dataclasses.replace(config, loader=loader)
        data = open_data(config)
        sharded = build_sharded(config, data, ranks)
        checkpoints = CheckpointFolder(folder, ranks)
        if load is not None:
            checkpoints.load(load, sharded)
        loaded = pieces_by_name(sharded)
        batches = iter(
            BatchStream(
                data,
                "train",
                batch_size=loader.batch_size,
                max_history=10,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        )
        pipeline, losses = CheckedPipeline(sharded, ranks), []
        for step in range(1, steps + 1):
            losses.append(float(pipeline.progress(batches).metrics["loss"]))
            sharded.average.update(step)
        if save is not None:
            checkpoints.save(save, sharded, {})
        return {"loss": losses, "loaded": loaded, "held": pieces_by_name(sharded)}


def whole(results: list[dict[str, Any]], which: str) -> dict[str, np.ndarray]:
    """Put the ranks' pieces together; what every rank holds must be equal on all."""
    values: dict[str, np.ndarray] = {}
    for name in sorted({name for result in results for name in result[which]}):
        pieces: Pieces = [piece for result in results for piece in result[which].get(name, [])]
        shape = np.max([np.add(place, piece.shape) for place, piece in pieces], axis=0).astype(int)
        values[name] = np.zeros(tuple(shape), dtype=pieces[0][1].dtype)
        filled = np.zeros(tuple(shape), dtype=bool)
        for place, piece in pieces:
            part = tuple(slice(start, start + size) for start, size in zip(place, piece.shape, strict=True))
            assert not filled[part].any() or np.array_equal(values[name][part], piece), name
            values[name][part], filled[part] = piece, True
        assert filled.all(), name
    return values


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, Gang]]:
    with Gang(1, timeout=240) as one, Gang(2, timeout=240) as two, Gang(4, timeout=240) as four:
        yield {1: one, 2: two, 4: four}


def config_for(data: Path, sharding: str, optimizer: str, seed: int) -> Config:
    """A model whose tables, under column-wise sharding, are cut in two."""
    tables = {name: {"sharding": ["table_wise"]} for name in SMALL} if sharding == "row_wise" else {}
    return Config(
        data=str(data),
        seed=seed,
        loader=LoaderConfig(max_history=10),
        model=ModelConfig(
            **{**WHOLE_EM3, "embedding_dim": 2 * MIN_CW_DIM, "unknown_id_rate": 0.0, "alignment_weight": 0.5}
        ),
        embeddings=EmbeddingConfig(optimizer=optimizer, sharding=sharding, tables=tables),  # type: ignore[arg-type]
    )


@pytest.mark.fault
@pytest.mark.parametrize(("optimizer", "plans"), PLANS, ids=["rowwise", "columns", "all"])
def test_everything_arrives_on_other_ranks(
    gangs: dict[int, Gang], tiny_data: Path, tmp_path: Path, optimizer: str, plans: list[str]
) -> None:
    def under(sharding: str, seed: int) -> Config:
        return config_for(tiny_data, sharding, optimizer, seed)

    (first, plan), *others = zip(WORLD_SIZES, plans, strict=True)
    saved = whole(gangs[first].run(go, under(plan, 0), tmp_path, None, 4, 1), "held")
    assert any("pool" in name and np.abs(value).max() > 0 for name, value in saved.items()), "the bank is compared"
    for part in ("average/", "/exp_avg_sq", "momentum1"):
        assert any(part in name and np.abs(value).max() > 0 for name, value in saved.items()), part
    for number, (world_size, plan) in enumerate(others, start=1):
        results = gangs[world_size].run(go, under(plan, number), tmp_path, number, 0, number + 1)
        loaded = whole(results, "loaded")
        assert loaded.keys() == saved.keys()
        for name, value in saved.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    last = len(plans)
    losses = [
        np.mean([rank["loss"] for rank in gangs[n].run(go, under(plans[-1], 9), tmp_path, last, 2, None)], axis=0)
        for n in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("saved", "loaded", "said"),
    [
        ("table_wise", "column_wise", "each of 1 column shards of user_table, this plan needs 2"),
        ("column_wise", "table_wise", "each of 2 column shards of user_table, this plan needs 1"),
    ],
)
def test_rowwise_adagrad_is_not_moved_to_or_from_column_shards(
    tiny_data: Path, tmp_path: Path, saved: str, loaded: str, said: str
) -> None:
    """Refused by one line when training goes on; to use the model, any plan will do."""
    go(config_for(tiny_data, saved, "rowwise_adagrad", 0), tmp_path, None, 1, 1)
    other = config_for(tiny_data, loaded, "rowwise_adagrad", 1)
    with pytest.raises(CheckpointError, match=said):
        go(other, tmp_path, 1, 0, None)
    with process_group() as ranks:
        CheckpointFolder(tmp_path, ranks).load(1, build_sharded(other, open_data(other), ranks), optimizer=False)
