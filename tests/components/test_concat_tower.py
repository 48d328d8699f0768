"""The concat tower: contract, missing modalities, broken options."""

import pytest
import torch
from torch import nn

from tests.components.tower_contract import COUNTS, DIMS, WIDTH, check_tower, random_tokens
from torchrec_em3.components.towers.concat import ConcatTower, ConcatTowerOptions
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import TOWERS


@pytest.mark.parametrize("options", [ConcatTowerOptions(), ConcatTowerOptions(hidden=(), dropout=0.2)])
def test_keeps_the_contract(options: ConcatTowerOptions) -> None:
    check_tower(ConcatTower(options, DIMS, COUNTS, WIDTH))


def test_a_missing_modality_is_a_learned_vector() -> None:
    torch.manual_seed(0)
    tower = ConcatTower(ConcatTowerOptions(), DIMS, COUNTS, WIDTH)
    tokens = random_tokens(6)
    before_UD = tower(tokens)
    nn.init.normal_(tower.missing["text"])
    changed_U = (tower(tokens) - before_UD).abs().amax(1) > 1e-6
    assert torch.equal(changed_U, ~tokens["text"].valid_UT.any(1))


def test_refuses_by_name() -> None:
    with pytest.raises(ConfigError, match="hidden"):
        ConcatTowerOptions(hidden=(8, 0))
    with pytest.raises(ConfigError, match="dropout"):
        ConcatTowerOptions(dropout=-0.1)
    part = TOWERS.get("concat")
    with pytest.raises(ConfigError, match="at least one modality"):
        part.build(part.options(), {}, {}, WIDTH)
