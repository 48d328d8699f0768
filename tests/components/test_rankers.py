"""The din ranker: contract, interactions, broken options."""

import pytest
import torch

from tests.components.ranker_contract import BLOCK_DIMS, check_ranker, random_blocks
from torchrec_em3.components.rankers.din import DinRanker, DinRankerOptions
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import RANKERS


@pytest.mark.parametrize(
    "options",
    [
        DinRankerOptions(),
        DinRankerOptions(hidden=(5,), interactions=False, dropout=0.3, activation="prelu"),
        DinRankerOptions(hidden=(), activation="silu"),
    ],
)
def test_keeps_the_contract(options: DinRankerOptions) -> None:
    torch.manual_seed(0)
    check_ranker(DinRanker(options, BLOCK_DIMS))


def test_inputs_are_the_blocks_and_the_dot_products_of_equal_widths() -> None:
    ranker = DinRanker(DinRankerOptions(hidden=()), BLOCK_DIMS)
    seen = []
    ranker.mlp[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    blocks = random_blocks(3)
    ranker(blocks)
    target, interest, content = blocks["target"], blocks["interest"], blocks["content"]
    pairs = [(target * interest).sum(1), (target * content).sum(1), (interest * content).sum(1)]
    expected = torch.cat([*blocks.values(), torch.stack(pairs, dim=1) / 2.0], dim=1)
    torch.testing.assert_close(seen[0], expected)


def test_lone_block_has_no_interactions() -> None:
    ranker = DinRanker(DinRankerOptions(), {"user": 3})
    assert ranker.mlp[0].in_features == 3
    assert ranker({"user": torch.randn(2, 3)}).shape == (2,)


def test_refuses_by_name() -> None:
    with pytest.raises(ConfigError, match="hidden"):
        DinRankerOptions(hidden=(0,))
    with pytest.raises(ConfigError, match="dropout"):
        DinRankerOptions(dropout=1.0)
    with pytest.raises(ConfigError, match="activation"):
        DinRankerOptions(activation="tanh")
    for block_dims in ({}, {"user": 0}):
        with pytest.raises(ConfigError, match="blocks of width"):
            DinRanker(DinRankerOptions(), block_dims)
    assert RANKERS.get("din").build is DinRanker
