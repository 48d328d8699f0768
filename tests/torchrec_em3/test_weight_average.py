"""The running average of the dense weights: its formula, the exchange, and that runs keep it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.whole_em3 import WHOLE_EM3
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.train import Trainer
from torchrec_em3.weight_average import WARM_UP, WeightAverage


def parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2, 2))}


def test_equals_the_plain_recursion() -> None:
    named = parameters()
    average = WeightAverage(named, 0.9)
    expected = {name: value.detach().double() for name, value in named.items()}
    for step in range(1, 200):
        decay = min(0.9, (1 + step) / (WARM_UP + step))
        for name, value in named.items():
            value.data += 0.1 * torch.randn_like(value)
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
        average.update(step)
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_exchange_gives_the_average_and_takes_it_back() -> None:
    named = parameters()
    average = WeightAverage(named, 0.5)
    before = {name: value.detach().clone() for name, value in average.state_dict().items()}
    for value in named.values():
        value.data += 1.0
    trained = {name: value.detach().clone() for name, value in named.items()}
    with average.applied():
        for name, value in named.items():
            assert torch.equal(value, before[name])
    for name, value in named.items():
        assert torch.equal(value, trained[name])
        assert torch.equal(average.state_dict()[name], before[name])


def test_decay_of_zero_follows_the_parameters() -> None:
    named = parameters()
    average = WeightAverage(named, 0.0)
    named["a"].data += 1.0
    average.update(1)
    assert torch.equal(average.state_dict()["a"], named["a"])


def test_trained_model_and_its_checkpoint_hold_the_average(tiny_data: Path, tmp_path: Path) -> None:
    config = resolve_parts(
        Config(
            data=str(tiny_data),
            run=str(tmp_path),
            loader=LoaderConfig(batch_size=128, max_history=10),
            model=ModelConfig(embedding_dim=8, **WHOLE_EM3),
            train=TrainConfig(epochs=1, average_decay=0.8),
        )
    )
    with process_group() as ranks:
        data = open_data(config)
        sharded = build_sharded(config, data, ranks)
        trainer = Trainer(config, tmp_path, data, sharded, ranks)
        trainer.fit()
        kept = {name: value.detach().clone() for name, value in sharded.model.named_parameters()}
        average = sharded.average.state_dict()
        again = build_sharded(dataclasses.replace(config, seed=1), data, ranks)
        folder = CheckpointFolder(tmp_path / "checkpoints", ranks)
        folder.load(folder.steps()[-1], again)
        trained = dict(again.model.named_parameters())
        name = "ranker.mlp.0.weight"
        assert not torch.equal(trained[name], kept[name])
        assert torch.equal(next(value for key, value in average.items() if key.endswith(name)), kept[name])


def test_refuses_a_decay_of_one() -> None:
    with pytest.raises(ConfigError, match="average_decay"):
        TrainConfig(average_decay=1.0)
