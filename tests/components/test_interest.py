"""Target attention over ragged histories against a plain float64 DIN, one row at a time."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.components import ragged_attention
from torchrec_em3.components.interest import LinearTargetAttention, TargetAttention, target_attention
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.errors import ConfigError

WIDTH = 4


def plain(attention: nn.Module, ragged: "Histories", valid_V: Tensor) -> Tensor:
    """DIN as its paper writes it: an MLP on [q, k, q - k, q * k], not folded, nothing shared between positions."""
    key_VD = ragged.items().content()
    interests = []
    for query_D, rows in zip(ragged.query_BD, ragged.row_N.split(ragged.lengths_B.tolist()), strict=True):
        total_D = torch.zeros_like(query_D)
        keys = [key_VD[row] for row in rows if valid_V[row]]
        if keys:
            score_L = torch.stack([score(attention, query_D, key_D) for key_D in keys])
            total_D = total_D + (score_L.softmax(0)[:, None] * torch.stack(keys)).sum(0)
        interests.append(total_D)
    return torch.stack(interests) if interests else ragged.query_BD.new_zeros(0, WIDTH)


def score(attention: nn.Module, query_D: Tensor, key_D: Tensor) -> Tensor:
    if isinstance(attention, LinearTargetAttention):
        return attention.score(torch.cat([key_D, query_D * key_D])).squeeze()
    hidden = attention.first(torch.cat([query_D, key_D, query_D - key_D, query_D * key_D]))
    for layer in attention.deeper:
        hidden = layer(functional.leaky_relu(hidden, ragged_attention.NEGATIVE_SLOPE))
    return hidden.squeeze()


class Histories:
    """Random histories of the given lengths over a few items, whose vectors may be a linear map of their rows."""

    def __init__(self, lengths: list[int], num_items: int, mapped: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        double: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
        self.query_BD = torch.randn(len(lengths), WIDTH, **double).requires_grad_()
        self.rows_VD = torch.randn(num_items, WIDTH, **double).requires_grad_()
        self.map = [torch.randn(WIDTH, WIDTH, **double).requires_grad_(), torch.randn(WIDTH, **double).requires_grad_()]
        self.row_N = torch.randint(num_items, (sum(lengths),), generator=generator)
        self.lengths_B = torch.tensor(lengths, dtype=torch.int64)
        self.valid_V = torch.rand(num_items, generator=generator) < 0.6
        self.mapped = mapped

    def items(self, valid_V: Tensor | None = None) -> HistoryItems:
        return HistoryItems(self.rows_VD, valid_V, *(self.map if self.mapped else ()))

    def interest(self, attention: nn.Module, valid_V: Tensor | None = None) -> Tensor:
        return attention(self.query_BD, self.items(valid_V), self.row_N, self.lengths_B)


def build(hidden: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(1)
    attention = target_attention(WIDTH, hidden).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.7)
    return attention


def results(found_BD: Tensor, attention: nn.Module, ragged: Histories) -> list[Tensor]:
    """Return a result and its gradients."""
    wanted = [ragged.query_BD, ragged.rows_VD, *ragged.map, *attention.parameters()]
    loss = (found_BD * torch.arange(1, found_BD.numel() + 1).view_as(found_BD)).sum()
    if not loss.requires_grad:
        return [found_BD, *(torch.zeros_like(tensor) for tensor in wanted)]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [found_BD, *gradients]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_attention, "CPU_CHUNK", 3)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=5),
    num_items=st.integers(1, 4),
    hidden=st.sampled_from([(), (3,), (1,), (4, 2), (3, 1)]),
    mapped=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_plain_din(
    lengths: list[int], num_items: int, hidden: tuple[int, ...], mapped: bool, masked: bool, seed: int
) -> None:
    attention, ragged = build(hidden), Histories(lengths, num_items, mapped, seed)
    valid_V = ragged.valid_V if masked else torch.ones(num_items, dtype=torch.bool)
    found = ragged.interest(attention, valid_V if masked else None)
    assert found.shape == (len(lengths), WIDTH)
    expected = plain(attention, ragged, valid_V)
    for one, other in zip(results(found, attention, ragged), results(expected, attention, ragged), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 2, 4, 13, 14, 4096])
def test_any_chunk_gives_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_attention, "CPU_CHUNK", chunk)
    attention, ragged = build((3, 2)), Histories([4, 0, 1, 8], 5)
    expected = plain(attention, ragged, torch.ones(5, dtype=torch.bool))
    found = results(ragged.interest(attention), attention, ragged)
    for one, other in zip(found, results(expected, attention, ragged), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("hidden", "mapped"), itertools.product([(), (3,), (3, 2)], [True, False]))
def test_gradients_by_finite_differences(hidden: tuple[int, ...], mapped: bool) -> None:
    attention, ragged = build(hidden), Histories([2, 0, 3], 3, mapped)
    inputs = (ragged.query_BD, ragged.rows_VD, *(ragged.map if mapped else ()), *attention.parameters())
    assert torch.autograd.gradcheck(lambda *_: ragged.interest(attention), inputs)


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_int32_lengths(hidden: tuple[int, ...]) -> None:
    attention, ragged = build(hidden), Histories([2, 1], 3)
    expected = plain(attention, ragged, torch.ones(3, dtype=torch.bool))
    ragged.lengths_B = ragged.lengths_B.int()
    torch.testing.assert_close(ragged.interest(attention), expected)


@pytest.mark.parametrize(("hidden", "mapped"), itertools.product([(), (3,)], [True, False]))
def test_invalid_items_are_left_out_whatever_they_hold(hidden: tuple[int, ...], mapped: bool) -> None:
    attention, ragged = build(hidden), Histories([3, 2, 0], 4, mapped)
    valid_V = torch.tensor([True, False, True, True])
    before = results(ragged.interest(attention, valid_V), attention, ragged)
    ragged.rows_VD.data[1] = torch.nan
    after = results(ragged.interest(attention, valid_V), attention, ragged)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert not ragged.interest(attention, torch.zeros(4, dtype=torch.bool)).any()


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_large_scores_stay_finite(hidden: tuple[int, ...]) -> None:
    attention, ragged = build(hidden), Histories([5, 3], 4)
    with torch.no_grad():
        ragged.rows_VD *= 1e6
    found = results(ragged.interest(attention), attention, ragged)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_float32_agrees_with_float64_at_full_size_of_a_chunk(
    hidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged_attention, "CPU_CHUNK", 64)
    attention, ragged = build(hidden), Histories([40, 0, 33, 71], 20)
    exact = ragged.interest(attention)
    ragged.query_BD, ragged.rows_VD = ragged.query_BD.float(), ragged.rows_VD.float()
    torch.testing.assert_close(ragged.interest(attention.float()), exact.float(), rtol=1e-4, atol=1e-5)


def test_refuses_broken_widths() -> None:
    with pytest.raises(ConfigError, match="widths"):
        TargetAttention(4, (8, 0))
    with pytest.raises(ConfigError, match="widths"):
        TargetAttention(4, ())
    with pytest.raises(ConfigError, match="width"):
        LinearTargetAttention(0)
