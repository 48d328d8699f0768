"""Tables in half precision: half the bytes, float32 look-ups, nearly the same losses."""

from pathlib import Path

import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from benchmarks.whole_em3 import WHOLE_EM3
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.components.embeddings import Precision
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import process_group


def config_for(data: Path, precision: Precision) -> Config:
    return resolve_parts(
        Config(
            data=str(data),
            loader=LoaderConfig(batch_size=128, max_history=10),
            model=ModelConfig(embedding_dim=8, **WHOLE_EM3, unknown_id_rate=0.0),
            embeddings=EmbeddingConfig(precision=precision),
        )
    )


def losses_and_types(data: Path, precision: Precision) -> tuple[list[float], dict[str, torch.dtype]]:
    """Train a few steps from equal dense weights; return the losses and how each table is stored."""
    config = config_for(data, precision)
    with process_group() as ranks:
        sharded = build_sharded(config, open_data(config), ranks)
        state = sharded.module.state_dict()
        tables = {name: value for name, value in state.items() if name.endswith("_table.weight")}
        for value in tables.values():
            assert isinstance(value, ShardedTensor)
            for shard in value.local_shards():
                shard.tensor.data.copy_(
                    torch.sin(torch.arange(shard.tensor.numel()).float()).view_as(shard.tensor) * 0.1
                )
        pipeline = CheckedPipeline(sharded, ranks)
        batches = iter(BatchStream(open_data(config), "train", batch_size=128, max_history=10))
        losses = [float(pipeline.progress(batches).metrics["rank_loss"]) for _ in range(6)]
        return losses, {name: value.dtype for name, value in tables.items()}


def test_half_precision_tables_train_like_full_ones(tiny_data: Path) -> None:
    full, full_types = losses_and_types(tiny_data, "fp32")
    half, half_types = losses_and_types(tiny_data, "fp16")
    assert set(full_types.values()) == {torch.float32}
    assert set(half_types.values()) == {torch.float16}
    assert half == pytest.approx(full, abs=2e-3)
    assert half != full


def test_bfloat16_is_refused_on_a_cpu(tiny_data: Path) -> None:
    config = config_for(tiny_data, "bf16")
    with process_group() as ranks, pytest.raises(ConfigError, match="bf16 is not supported on CPU"):
        build_sharded(config, open_data(config), ranks)
