"""The frozen_pool tower: contract, the very concatenation, missing modalities."""

import pytest
import torch

from tests.components.tower_contract import COUNTS, DIMS, WIDTH, check_tower, random_tokens
from torchrec_em3.components.towers.frozen_pool import FrozenPoolTower
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import TOWERS, NoOptions


def build() -> FrozenPoolTower:
    return FrozenPoolTower(NoOptions(), DIMS, COUNTS, WIDTH)


def test_keeps_the_contract() -> None:
    check_tower(build())


def test_is_the_pooled_modalities_each_with_a_flag_and_nothing_else() -> None:
    tower, tokens = build(), random_tokens(5)
    assert not list(tower.parameters())
    content_UC = tower(tokens)
    columns = iter(content_UC.split([1] * tower.output_width, dim=1))
    for name, (tokens_UTI, valid_UT) in tokens.items():
        pooled_UI = torch.cat([next(columns) for _ in range(DIMS[name])], dim=1)
        flag_U1 = next(columns)
        for item in range(5):
            mean_I = tokens_UTI[item][valid_UT[item]].mean(0) if valid_UT[item].any() else torch.zeros(DIMS[name])
            scale = mean_I.square().mean().sqrt() if valid_UT[item].any() else 1.0
            torch.testing.assert_close(pooled_UI[item], mean_I / scale)
            assert flag_U1[item].item() == float(valid_UT[item].any())
    assert next(columns, None) is None


def test_refuses_no_modality() -> None:
    with pytest.raises(ConfigError, match="at least one modality"):
        TOWERS.get("frozen_pool").build(NoOptions(), {}, {}, WIDTH)
