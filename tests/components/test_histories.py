"""The three history contents: contract, their start, what is trained, how they follow the target branch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.components.history_contract import WIDTH, FakeSource, check_history, small_tower, valid_content
from tests.components.tower_contract import COUNTS, DIMS
from torchrec_em3.components.histories.cache import CachedHistory, CachedHistoryOptions
from torchrec_em3.components.histories.lora_qformer import LoraTowerHistory, LoraTowerHistoryOptions
from torchrec_em3.components.histories.shared import SharedHistory
from torchrec_em3.components.interest import target_attention
from torchrec_em3.components.towers.concat import ConcatTower, ConcatTowerOptions
from torchrec_em3.components.towers.qformer import FusionQFormer
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import HISTORIES

NAMES = ["cache", "lora_qformer", "shared"]


def build(name: str, tower: nn.Module) -> nn.Module:
    part = HISTORIES.get(name)
    return part.build(part.options(**({"rank": 8} if name == "cache" else {})), tower, WIDTH)


@pytest.fixture
def tower() -> FusionQFormer:
    return small_tower()


@pytest.fixture
def projection() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract(name: str, tower: FusionQFormer) -> None:
    check_history(build(name, tower), tower)


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_target_branch_sees_the_items(name: str, tower: FusionQFormer, projection: nn.Linear) -> None:
    source = FakeSource(tower, 10)
    content_VD, valid_V = content(build(name, tower), source, tower, projection)
    expected_VD = projection(tower(source.tokens()))
    torch.testing.assert_close(content_VD[valid_V], expected_VD[valid_V], rtol=0, atol=1e-6)


def content(history: nn.Module, source: FakeSource, tower: nn.Module, projection: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the vectors of all items, rows of invalid ones taken as zeros, and which are valid."""
    items = history(source, tower, projection)
    return valid_content(items), items.valid_V


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("name", ["cache", "lora_qformer"])
def test_only_the_adapters_are_trained(name: str, tower: FusionQFormer, projection: nn.Linear) -> None:
    history = build(name, tower)
    for _ in range(2):  # with B at zero the gradient of A is zero: take one step away from there
        content(history, FakeSource(tower, 10), tower, projection)[0].square().sum().backward()
        with torch.no_grad():
            for parameter in history.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert not gradients(tower)
    assert not gradients(projection)
    trained = set(gradients(history))
    assert trained == {name for name, parameter in history.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in history.named_parameters() if "lora_" in n or n in ("down_RD", "up_DR")}


def test_shared_trains_tower_and_projection(tower: FusionQFormer, projection: nn.Linear) -> None:
    history = SharedHistory(HISTORIES.get("shared").options(), tower, WIDTH)
    assert not list(history.parameters())
    content(history, FakeSource(tower, 10), tower, projection)[0].square().sum().backward()
    assert len(gradients(tower)) == len(list(tower.parameters()))
    assert len(gradients(projection)) == 2


def test_cache_without_a_rank_is_the_projection_alone(tower: FusionQFormer, projection: nn.Linear) -> None:
    history = CachedHistory(CachedHistoryOptions(), tower, WIDTH)
    check_history(history, tower)
    assert not history.state_dict()
    source = FakeSource(tower, 9)
    content_VD, valid_V = content(history, source, tower, projection)
    torch.testing.assert_close(content_VD[valid_V], projection(source.rows_VD[valid_V]))


def test_cache_correction_is_low_rank_and_scaled(tower: FusionQFormer, projection: nn.Linear) -> None:
    history = CachedHistory(CachedHistoryOptions(rank=3, alpha=6), tower, WIDTH)
    nn.init.normal_(history.up_DR)
    source = FakeSource(tower, 9)
    for training in (True, False):
        content_VD, valid_V = content(history.train(training), source, tower, projection)
        rows_VD = source.rows_VD[valid_V]
        expected_VD = projection(rows_VD) + 2.0 * rows_VD @ history.down_RD.T @ history.up_DR.T
        torch.testing.assert_close(content_VD[valid_V], expected_VD)


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_rows_never_written_do_not_reach_the_interest(
    hidden: tuple[int, ...], tower: FusionQFormer, projection: nn.Linear
) -> None:
    history, attention = CachedHistory(CachedHistoryOptions(rank=8), tower, WIDTH), target_attention(WIDTH, hidden)
    nn.init.normal_(history.up_DR)
    row_N, lengths_B, query_BD = torch.arange(10), torch.tensor([4, 6]), torch.randn(2, WIDTH)
    results = []
    for filler in (torch.nan, 5.0):
        source = FakeSource(tower, 10)
        source.rows_VD[~source.written_V] = filler
        history.zero_grad()
        interest_BD = attention(query_BD, history(source, tower, projection), row_N, lengths_B)
        interest_BD.square().sum().backward()
        results.append([interest_BD.detach(), history.down_RD.grad.clone(), history.up_DR.grad.clone()])
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_follows_the_target_branch(name: str, tower: FusionQFormer, projection: nn.Linear) -> None:
    history = build(name, tower)
    history(FakeSource(tower, 10), tower, projection)
    for parameter in [*tower.parameters(), *projection.parameters()]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    source = FakeSource(tower, 10)
    content_VD, valid_V = content(history, source, tower, projection)
    torch.testing.assert_close(content_VD[valid_V], projection(tower(source.tokens()))[valid_V], rtol=0, atol=1e-5)


def test_adapters_of_the_copy_act_in_training_and_evaluation(tower: FusionQFormer, projection: nn.Linear) -> None:
    history = LoraTowerHistory(LoraTowerHistoryOptions(rank=2), tower, WIDTH)
    source = FakeSource(tower, 10)
    plain_VD, _ = content(history, source, tower, projection)
    for name, parameter in history.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    for training in (True, False):
        changed_VD, valid_V = content(history.train(training), source, tower, projection)
        assert bool(((changed_VD - plain_VD).abs().amax(1) > 1e-3)[valid_V].all())
    reloaded = LoraTowerHistory(LoraTowerHistoryOptions(rank=2), small_tower(), WIDTH)
    reloaded.load_state_dict(copy.deepcopy(history.state_dict()))
    torch.testing.assert_close(content(reloaded, source, tower, projection)[0], changed_VD)


def test_lora_adapts_every_map_of_a_tower_that_names_none(projection: nn.Linear) -> None:
    tower = ConcatTower(ConcatTowerOptions(), DIMS, COUNTS, WIDTH)
    history = LoraTowerHistory(LoraTowerHistoryOptions(), tower, WIDTH)
    check_history(history, tower)
    maps = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    assert sum("lora_A" in name for name, _ in history.named_parameters()) == len(maps)


@pytest.mark.parametrize("name", ["lora_qformer", "shared"])
def test_what_makes_tokens_is_trained_from_the_shared_history_alone(
    name: str, tower: FusionQFormer, projection: nn.Linear
) -> None:
    """Embeddings of codes are weights of the target branch, as the tower is."""
    source = FakeSource(tower, 10)
    for tokens in source.tokens().values():
        tokens.tokens_UTD.requires_grad_()
    content(build(name, tower), source, tower, projection)[0].square().sum().backward()
    assert {tokens.tokens_UTD.grad is None for tokens in source.tokens().values()} == {name == "lora_qformer"}


def test_lora_refuses_towers_it_cannot_adapt(tower: FusionQFormer) -> None:
    class NoMaps(nn.Module):
        pass

    class WrongMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.gate = nn.Linear(2, 2), nn.SiLU()
            self.lora_targets = ["map", "gone"]

    with pytest.raises(ConfigError, match="no linear map"):
        LoraTowerHistory(LoraTowerHistoryOptions(), NoMaps(), WIDTH)
    with pytest.raises(ConfigError, match="gone"):
        LoraTowerHistory(LoraTowerHistoryOptions(), WrongMaps(), WIDTH)


@pytest.mark.parametrize(("options", "rank"), [(CachedHistoryOptions, -1), (LoraTowerHistoryOptions, 0)])
def test_options_are_checked(options: type, rank: int) -> None:
    with pytest.raises(ConfigError, match="rank"):
        options(rank=rank)


def test_lora_dropout_is_checked() -> None:
    with pytest.raises(ConfigError, match="dropout"):
        LoraTowerHistoryOptions(dropout=1.0)
