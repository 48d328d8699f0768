"""Encoders trained above a cut on two ranks: as on one."""

from typing import Any

import numpy as np
import pytest

import tests.tiny_encoders
import tests.tiny_parts  # noqa: F401
from tests.gang import Gang
from tests.torchrec_em3.test_encoder_training import ENCODERS, cut_data  # noqa: F401  (a fixture)
from tests.torchrec_em3.test_sharding_parity import gangs, train_steps, whole  # noqa: F401  (a fixture)
from torchrec_em3.config import Config, EncodersConfig, EncoderTraining, LoaderConfig, ModelConfig, TrainConfig

pytestmark = pytest.mark.slow


def train_here(config: Config, world_size: int) -> dict[str, Any]:
    """As `train_steps`, in a process that has imported this file and with it the tiny encoders."""
    return train_steps(config, world_size)


@pytest.mark.parametrize("training", ["lora", "last_n"])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_two_ranks_equal_one(
    gangs: tuple[Gang, Gang],  # noqa: F811
    cut_data: str,  # noqa: F811
    training: str,
    stop_gradient: bool,
) -> None:
    text = EncoderTraining(training=training, rank=2)  # type: ignore[arg-type]
    config = Config(
        data=str(cut_data),
        plugins="tests.tiny_encoders",
        loader=LoaderConfig(max_history=10),
        model=ModelConfig(
            embedding_dim=8, unknown_id_rate=0.0, alignment_weight=0.5, stop_gradient=stop_gradient,
            encoders=EncodersConfig(text=text),
        ),
        train=TrainConfig(encoder_learning_rate=0.01),
    )  # fmt: skip
    one, two = (gang.run(train_here, config, gang.world_size) for gang in gangs)
    assert np.mean([rank["loss"] for rank in two], axis=0) == pytest.approx(one[0]["loss"], rel=1e-6)
    expected, found = whole(one), whole(two)
    for name, table in expected.items():
        np.testing.assert_allclose(found[name], table, rtol=1e-4, atol=2e-6, err_msg=name)
    trained = [name for name in one[0]["dense"] if name.startswith(ENCODERS)]
    assert any((".lora_B" in name) == (training == "lora") for name in trained)
    for name, weight in one[0]["dense"].items():
        np.testing.assert_allclose(two[0]["dense"][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(two[0]["dense"][name], two[1]["dense"][name], err_msg=name)
