"""Targets encoded once, by the ranks that own them: losses, gradients and bank as where each rank encodes its own."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

import tests.tiny_encoders
import tests.tiny_parts  # noqa: F401
from tests.gang import Gang
from tests.torchrec_em3.test_encoder_training import ENCODERS, cut_data  # noqa: F401  (a fixture)
from tests.torchrec_em3.test_sharding_parity import GLOBAL_BATCH, config_for, set_by_row, train_steps, whole
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.components.item_routing import owned_rows
from torchrec_em3.config import Config, EncodersConfig, EncoderTraining, TrainConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.tokens import TokenStore
from torchrec_em3.errors import ConfigError
from torchrec_em3.evaluate import evaluate_split, refresh_bank
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.process_group import process_group

WORLD_SIZES = (1, 2, 4)
TABLE_WISE = "table_wise"
"""Not row-wise: on four ranks the last one would hold no row of the smallest tables, which is refused on a CPU."""


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, Gang]]:
    with Gang(1, timeout=240) as one, Gang(2, timeout=240) as two, Gang(4, timeout=240) as four:
        yield {1: one, 2: two, 4: four}


def routed(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, routing="owner"))


def train_here(config: Config, world_size: int) -> dict[str, Any]:
    """As `train_steps`, in a process that has imported this file and with it the tiny encoders."""
    return train_steps(config, world_size)


def assert_alike(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Compare losses, tables, bank and dense weights; what ranks hold alike must be alike to the last bit."""
    for name in ("loss", "alignment"):
        mean = [np.mean([rank[name] for rank in ranks], axis=0) for ranks in (expected, found)]
        assert mean[1] == pytest.approx(mean[0], rel=1e-6)
    tables, others = whole(expected), whole(found)
    assert any("pool" in name for name in tables), "the bank is compared too"
    for name, table in tables.items():
        np.testing.assert_allclose(others[name], table, rtol=1e-4, atol=2e-6, err_msg=name)
    for name, weight in expected[0]["dense"].items():
        np.testing.assert_allclose(found[0]["dense"][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)
        for rank in found[1:]:
            np.testing.assert_array_equal(rank["dense"][name], found[0]["dense"][name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("content", ["fusion_qformer", "concat"])
def test_ranks_train_what_one_would_whoever_encodes(
    gangs: dict[int, Gang], tiny_data: Path, content: str, stop_gradient: bool
) -> None:
    """Sums of the same float32 terms, in another order for each number of ranks; nothing is drawn here."""
    config = config_for(tiny_data, TABLE_WISE, content=content, stop_gradient=stop_gradient)
    expected = gangs[1].run(train_here, config, 1)
    assert_alike(expected, gangs[4].run(train_here, config, 4))
    for world_size in WORLD_SIZES:
        assert_alike(expected, gangs[world_size].run(train_here, routed(config), world_size))


@pytest.mark.slow
def test_owners_draw_alike_on_any_number_of_ranks(gangs: dict[int, Gang], tiny_data: Path) -> None:
    config = routed(config_for(tiny_data, TABLE_WISE, encode_fraction=0.3))
    expected = gangs[1].run(train_here, config, 1)
    for world_size in WORLD_SIZES[1:]:
        assert_alike(expected, gangs[world_size].run(train_here, config, world_size))


@pytest.mark.slow
@pytest.mark.parametrize("training", ["lora", "last_n"])
def test_owners_train_encoders(gangs: dict[int, Gang], cut_data: str, training: str) -> None:  # noqa: F811
    text = EncoderTraining(training=training, rank=2)  # type: ignore[arg-type]
    config = config_for(Path(cut_data), "row_wise", encoders=EncodersConfig(text=text))
    config = dataclasses.replace(config, plugins="tests.tiny_encoders", train=TrainConfig(encoder_learning_rate=0.01))
    expected = gangs[1].run(train_here, config, 1)
    assert any(name.startswith(ENCODERS) for name in expected[0]["dense"])
    for world_size in WORLD_SIZES[:2]:
        assert_alike(expected, gangs[world_size].run(train_here, routed(config), world_size))


def gradients(config: Config, world_size: int, targets: int) -> dict[str, Any]:
    """Return averaged gradients of one step on batches with few distinct targets, and the items fetched by rank.

    Args:
        config: The run's options.
        world_size: Number of ranks.
        targets: Batches have the catalogue rows 1 to this one as targets.
    """
    load_builtin_parts()
    data = open_data(config)
    fetched: list[int] = []
    fetch = TokenStore.fetch

    def noted(store: TokenStore, items_U: torch.Tensor, device: Any = None) -> Any:
        fetched.extend(items_U.tolist())
        return fetch(store, items_U, device)

    with process_group() as ranks, mock.patch.object(TokenStore, "fetch", noted):
        sharded = build_sharded(config, data, ranks)
        for name, value in sharded.module.state_dict().items():
            if isinstance(value, ShardedTensor) and "table" in name:
                set_by_row(value)
        place = {"rank": ranks.rank, "world_size": world_size}
        batch = next(iter(BatchStream(data, "train", batch_size=GLOBAL_BATCH // world_size, max_history=10, **place)))
        batch.sparse["target"].values().remainder_(targets).add_(1)
        loss, output = sharded.module(batch)
        loss.backward()
        trained = {
            name: weight.grad
            for name, weight in sharded.model.content.named_parameters()  # type: ignore[union-attr]
            if weight.requires_grad
        }
        assert all(gradient is not None for gradient in trained.values())
        owned = owned_rows(sharded.model.item_rows, ranks.rank, world_size)
        step_fetched = list(fetched)
        refresh_bank(sharded, ranks)
        evaluate_split(sharded, data, "validation", config, ranks)
        return {
            "gradients": {name: gradient.numpy() for name, gradient in trained.items()},  # type: ignore[union-attr]
            "fetched": step_fetched,
            "all_fetched": sorted(set(fetched)),
            "owned": (owned.start, owned.stop),
            "metrics": {name: float(value) for name, value in output.metrics.items()},
        }


def test_gradients_are_the_local_ones_also_where_a_rank_owns_no_target(gangs: dict[int, Gang], tiny_data: Path) -> None:
    """The targets are rows 1 to 20 of 151, so of four ranks the first owns them all."""
    config = config_for(tiny_data, TABLE_WISE)
    expected = gangs[1].run(gradients, config, 1, 20)[0]["gradients"]
    local = gangs[4].run(gradients, config, 4, 20)
    found = gangs[4].run(gradients, routed(config), 4, 20)
    assert [len(rank["fetched"]) for rank in found] == [20, 0, 0, 0]
    assert min(len(rank["fetched"]) for rank in local) > 10
    largest = max(abs(gradient).max() for gradient in expected.values())
    assert largest > 1e-3
    for rank in (*local, *found):
        for name, gradient in expected.items():
            # Ranks add the same terms in another order, so what cancels to almost nothing has an error of their size.
            np.testing.assert_allclose(rank["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_rank_never_fetches_tokens_of_a_row_that_it_does_not_own(
    gangs: dict[int, Gang], tiny_data: Path, fraction: float
) -> None:
    config = routed(config_for(tiny_data, TABLE_WISE, encode_fraction=fraction))
    found = gangs[4].run(gradients, config, 4, 150)
    for rank in found:
        assert len(set(rank["fetched"])) == len(rank["fetched"]), "each item is encoded once"
        assert set(rank["all_fetched"]) == set(range(*rank["owned"])) - {0}, "training, refresh and evaluation"


@pytest.mark.parametrize("history", ["shared", "lora_qformer"])
def test_histories_that_encode_items_themselves_are_refused(tiny_data: Path, history: str) -> None:
    load_builtin_parts()
    config = routed(config_for(tiny_data, TABLE_WISE, history=history, history_options={}))
    with (
        process_group() as ranks,
        pytest.raises(ConfigError, match=r"--model\.routing owner encodes items on the ranks"),
    ):
        build_sharded(config, open_data(config), ranks)
