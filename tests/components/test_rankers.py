"""The rankers: contract, built-in or a user's; any widths of blocks; broken options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from tests.components.ranker_contract import BLOCK_DIMS, check_ranker, random_blocks
from torchrec_em3.components.rankers.blocks import Blocks
from torchrec_em3.components.rankers.dcn_v2 import DcnV2Ranker, DcnV2RankerOptions
from torchrec_em3.components.rankers.deepfm import DeepFMRanker, DeepFMRankerOptions
from torchrec_em3.components.rankers.din import DinRanker, DinRankerOptions
from torchrec_em3.components.rankers.dlrm import DlrmRanker, DlrmRankerOptions
from torchrec_em3.components.rankers.mlp import MLP
from torchrec_em3.components.rankers.mmoe import MmoeRanker, MmoeRankerOptions
from torchrec_em3.config import ModelConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.parts import build_part, load_plugins
from torchrec_em3.registry import RANKERS
from torchrec_em3.tasks import build_ranker

BUILTIN = {"dcn_v2": DcnV2Ranker, "deepfm": DeepFMRanker, "din": DinRanker, "dlrm": DlrmRanker, "mmoe": MmoeRanker}


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("din", {}),
        ("din", {"hidden": (5,), "interactions": False, "dropout": 0.3, "activation": "prelu"}),
        ("din", {"hidden": (), "activation": "silu"}),
        ("dcn_v2", {}),
        ("dcn_v2", {"cross_layers": 1, "rank": 1, "hidden": ()}),
        ("dcn_v2", {"cross_layers": 4, "rank": 5, "hidden": (7, 3), "dropout": 0.3, "activation": "silu"}),
        ("dlrm", {}),
        ("dlrm", {"bottom": (), "top": (16,)}),
        ("dlrm", {"bottom": (32, 16), "top": (32, 16)}),
        ("deepfm", {}),
        ("deepfm", {"hidden": ()}),
        ("deepfm", {"hidden": (7, 3), "dropout": 0.3, "activation": "prelu"}),
        ("mmoe", {}),
        ("mmoe", {"num_experts": 1, "expert": (16,), "tower": (8, 4), "interactions": False}),
    ],
)
def test_keeps_the_contract(name: str, options: dict[str, Any], num_tasks: int) -> None:
    torch.manual_seed(0)
    check_ranker(build_part(RANKERS, name, options, BLOCK_DIMS, num_tasks), num_tasks)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_one_task_is_what_is_built_where_no_number_is_given(name: str) -> None:
    torch.manual_seed(0)
    given = build_part(RANKERS, name, {}, BLOCK_DIMS, 1)
    torch.manual_seed(0)
    left_out = build_part(RANKERS, name, {}, BLOCK_DIMS)
    assert torch.equal(given(random_blocks(4)), left_out(random_blocks(4)))


PLUGIN = """
from dataclasses import dataclass

import torch
from torch import nn

from torchrec_em3.registry import RANKERS


@dataclass(frozen=True, kw_only=True)
class LogisticOptions:
    bias: bool = True


@RANKERS.register("test_logistic", options=LogisticOptions)
class LogisticRanker(nn.Module):
    def __init__(self, options, block_dims):
        super().__init__()
        self.names = list(block_dims)
        self.linear = nn.Linear(sum(block_dims.values()), 1, bias=options.bias)

    def forward(self, blocks):
        return self.linear(torch.cat([blocks[name] for name in self.names], dim=1)).squeeze(1)
"""


def test_a_users_ranker_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_rankers.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(RANKERS, "_parts", dict(RANKERS._parts))
    load_plugins("users_rankers")
    ranker = build_part(RANKERS, "test_logistic", {"bias": False}, BLOCK_DIMS)
    assert [name for name, _ in ranker.named_parameters()] == ["linear.weight"]
    check_ranker(ranker)
    options = ModelConfig(ranker="test_logistic")
    check_ranker(build_ranker(options, BLOCK_DIMS, ["click"]))
    with pytest.raises(ConfigError, match=r"test_logistic ranks by one task, but the data has 2 \(click, like\)"):
        build_ranker(options, BLOCK_DIMS, ["click", "like"])


@example(name="dlrm", widths=[1, 2], num_rows=1, num_tasks=2)
@given(
    name=st.sampled_from(sorted(BUILTIN)),
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    num_rows=st.integers(0, 3),
    num_tasks=st.integers(2, 3),
)
def test_blocks_of_any_widths_give_a_logit_for_each_task(
    name: str, widths: list[int], num_rows: int, num_tasks: int
) -> None:
    block_dims = {f"block_{place}": width for place, width in enumerate(widths)}
    blocks = {block: torch.randn(num_rows, width) for block, width in block_dims.items()}
    assert build_part(RANKERS, name, {}, block_dims)(blocks).shape == (num_rows,)
    assert build_part(RANKERS, name, {}, block_dims, num_tasks)(blocks).shape == (num_rows, num_tasks)


@pytest.mark.parametrize(
    ("widths", "common"), [((3,), 3), ((2, 4, 4), 4), ((8, 4, 4, 8), 4), ((4, 8, 8, 4), 4), ((1, 2, 3, 3), 3)]
)
def test_common_width_is_the_most_frequent_then_the_smallest(widths: tuple[int, ...], common: int) -> None:
    assert Blocks("any", {str(place): width for place, width in enumerate(widths)}).common_width == common


def test_mlp_has_activation_and_dropout_after_each_hidden_layer() -> None:
    mlp = MLP(DinRankerOptions(hidden=(4, 3), dropout=0.25, activation="silu"), 2, 1)
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.SiLU, nn.Dropout] * 2 + [nn.Linear]
    assert [layer.p for layer in mlp if isinstance(layer, nn.Dropout)] == [0.25, 0.25]


def test_dins_parameters_keep_the_names_that_checkpoints_have() -> None:
    ranker = DinRanker(DinRankerOptions(hidden=(8, 4)), {"user": 3})
    assert list(ranker.state_dict()) == [f"mlp.{place}.{kind}" for place in (0, 3, 6) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DinRankerOptions(hidden=(0,)), r"hidden of the din ranker is \(0,\), every width must be >= 1"),
        (lambda: DcnV2RankerOptions(hidden=(8, -1)), r"hidden of the dcn_v2 ranker is \(8, -1\)"),
        (lambda: DinRankerOptions(dropout=1.0), r"dropout of the din ranker is 1.0, must be in \[0, 1\)"),
        (lambda: DeepFMRankerOptions(dropout=-0.1), "dropout of the deepfm ranker is -0.1"),
        (lambda: DinRankerOptions(activation="tanh"), "activation of the din ranker is 'tanh', must be one of relu"),
        (lambda: DcnV2RankerOptions(rank=0), "rank of the dcn_v2 ranker is 0, must be >= 1"),
        (lambda: DcnV2RankerOptions(cross_layers=0), "cross_layers of the dcn_v2 ranker is 0, must be >= 1"),
        (lambda: DlrmRankerOptions(bottom=(0,)), r"bottom of the dlrm ranker is \(0,\), every width must be >= 1"),
        (lambda: DlrmRankerOptions(top=(4, 0)), r"top of the dlrm ranker is \(4, 0\), every width must be >= 1"),
        (lambda: DlrmRankerOptions(top=()), "top of the dlrm ranker is empty, must have at least one width"),
        (lambda: MmoeRankerOptions(num_experts=0), "num_experts of the mmoe ranker is 0, must be >= 1"),
        (lambda: MmoeRankerOptions(expert=(8, 0)), r"expert of the mmoe ranker is \(8, 0\), every width must be >= 1"),
        (lambda: MmoeRankerOptions(tower=()), "tower of the mmoe ranker is empty, must have at least one width"),
        (lambda: DlrmRanker(DlrmRankerOptions(), {"user": 3}), "the dlrm ranker needs an embedding beside"),
    ],
)
def test_refuses_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_is_registered_and_refuses_blocks_without_width(name: str) -> None:
    assert RANKERS.get(name).build is BUILTIN[name]
    for block_dims in ({}, {"user": 0, "target": 4}):
        with pytest.raises(ConfigError, match=f"the {name} ranker needs blocks of width >= 1"):
            build_part(RANKERS, name, {}, block_dims)
