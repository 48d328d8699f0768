"""The pipeline is one batch ahead, and that changes no number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.gang import Gang
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.evaluate import predict
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.pending_batch import PendingBatch
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.sharding import ShardedModel

STEPS = 4


def config_for(tiny_data: Path) -> Config:
    return Config(
        data=str(tiny_data),
        loader=LoaderConfig(batch_size=64, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3, encode_fraction=0.5),
        embeddings=EmbeddingConfig(sharding="row_wise"),
    )


def prepare(config: Config, ranks: Ranks) -> tuple[ShardedModel, Iterator[Any]]:
    """Return a model and the first batches."""
    load_builtin_parts()
    data = open_data(config)
    torch.manual_seed(0)
    sharded = build_sharded(config, data, ranks)
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    stream = iter(BatchStream(data, "train", batch_size=64, max_history=10, **place))
    torch.manual_seed(1)
    return sharded, iter([next(stream) for _ in range(STEPS)])


def pipelined(config: Config) -> list[float]:
    """Return the losses of the pipeline, a split scored in the middle, with a batch on its way."""
    with process_group() as ranks:
        sharded, batches = prepare(config, ranks)
        pipeline, losses = CheckedPipeline(sharded, ranks), []
        for step in range(STEPS):
            losses.append(float(pipeline.progress(batches).metrics["loss"]))
            if step == 1:
                predict(sharded, open_data(config), "validation", config, ranks)
        with pytest.raises(StopIteration):
            pipeline.progress(batches)
        return losses


def one_by_one(config: Config) -> list[float]:
    """Return the losses of plain steps."""
    with process_group() as ranks:
        sharded, batches = prepare(config, ranks)
        losses = []
        for batch in batches:
            sharded.optimizer.zero_grad()
            loss, output = sharded.module(batch)
            loss.backward()
            sharded.optimizer.step()
            losses.append(float(output.metrics["loss"]))
        return losses


def order_of_events(config: Config) -> list[str]:
    """Return what the pipeline did, in order: asked for ids, sent those asked for, went forward or back."""
    events: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any) -> Any:
            events.append(name)
            return call(*arguments)

        return wrapper

    with process_group() as ranks:
        sharded, batches = prepare(config, ranks)
        model = sharded.model
        model.ask = noted("ask", model.ask)  # type: ignore[method-assign]
        model.forward = noted("forward", model.forward)  # type: ignore[method-assign]
        with (
            mock.patch.object(PendingBatch, "send", noted("send", PendingBatch.send)),
            mock.patch.object(torch.Tensor, "backward", noted("backward", torch.Tensor.backward)),
        ):
            pipeline = CheckedPipeline(sharded, ranks)
            for _ in range(STEPS):
                pipeline.progress(batches)
    return events


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_ahead_changes_no_loss(tiny_data: Path, world_size: int) -> None:
    with Gang(world_size, timeout=240) as gang:
        assert gang.run(pipelined, config_for(tiny_data)) == gang.run(one_by_one, config_for(tiny_data))


def test_the_next_ids_travel_while_a_step_computes(tiny_data: Path) -> None:
    with Gang(1, timeout=240) as gang:
        (events,) = gang.run(order_of_events, config_for(tiny_data))
    step = ["ask", "forward", "send", "backward"]
    assert events == ["ask", *step * (STEPS - 1), "forward", "backward"]
