"""Target attention over ragged histories against a plain float64 DIN, one row at a time."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.components import interest
from torchrec_em3.components.interest import TargetAttention
from torchrec_em3.errors import ConfigError

WIDTH = 4


def plain(
    attention: TargetAttention, query_BD: Tensor, key_VD: Tensor, row_N: Tensor, lengths_B: Tensor, valid_V: Tensor
) -> Tensor:
    """DIN as its paper writes it: an MLP on [q, k, q - k, q * k], not folded, nothing shared between positions."""
    interests = []
    for query_D, rows in zip(attention.align(query_BD), row_N.split(lengths_B.tolist()), strict=True):
        total_D = torch.zeros_like(query_D)
        keys = [key_VD[row] for row in rows if valid_V[row]]
        scores = []
        for key_D in keys:
            hidden = attention.first(torch.cat([query_D, key_D, query_D - key_D, query_D * key_D]))
            for layer in attention.deeper:
                hidden = layer(functional.leaky_relu(hidden, interest.NEGATIVE_SLOPE))
            scores.append(hidden.squeeze())
        if keys:
            score_L = torch.stack(scores)
            weight_L = score_L.softmax(0) if attention.normalize == "softmax" else score_L / WIDTH**0.5
            total_D = total_D + (weight_L[:, None] * torch.stack(keys)).sum(0)
        interests.append(total_D)
    return torch.stack(interests) if interests else query_BD.new_zeros(0, WIDTH)


class Ragged:
    """Random histories of the given lengths over a few items."""

    def __init__(self, lengths: list[int], num_items: int, query_dim: int = WIDTH, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        double: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
        self.query_BD = torch.randn(len(lengths), query_dim, **double).requires_grad_()
        self.key_VD = torch.randn(num_items, WIDTH, **double).requires_grad_()
        self.row_N = torch.randint(num_items, (sum(lengths),), generator=generator)
        self.lengths_B = torch.tensor(lengths, dtype=torch.int64)
        self.valid_V = torch.rand(num_items, generator=generator) < 0.6

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query_BD, self.key_VD, self.row_N, self.lengths_B


def build(hidden: tuple[int, ...], normalize: Any = "softmax", query_dim: int = WIDTH) -> TargetAttention:
    torch.manual_seed(1)
    attention = TargetAttention(query_dim, WIDTH, hidden, normalize).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.7)
    return attention


def results(found_BD: Tensor, attention: TargetAttention, ragged: Ragged) -> list[Tensor]:
    """Return a result and its gradients."""
    wanted = [ragged.query_BD, ragged.key_VD, *attention.parameters()]
    loss = (found_BD * torch.arange(1, found_BD.numel() + 1).view_as(found_BD)).sum()
    if not loss.requires_grad:
        return [found_BD, *(torch.zeros_like(tensor) for tensor in wanted)]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [found_BD, *gradients]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interest, "CPU_CHUNK", 3)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=5),
    num_items=st.integers(1, 4),
    hidden=st.sampled_from([(), (3,), (1,), (4, 2), (3, 1)]),
    normalize=st.sampled_from(["softmax", "none"]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_plain_din(
    lengths: list[int], num_items: int, hidden: tuple[int, ...], normalize: str, masked: bool, seed: int
) -> None:
    attention, ragged = build(hidden, normalize), Ragged(lengths, num_items, seed=seed)
    valid_V = ragged.valid_V if masked else torch.ones(num_items, dtype=torch.bool)
    found = attention(*ragged.inputs, valid_V if masked else None)
    expected = plain(attention, *ragged.inputs, valid_V)
    assert found.shape == (len(lengths), WIDTH)
    for one, other in zip(results(found, attention, ragged), results(expected, attention, ragged), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 2, 4, 13, 14, 4096])
def test_any_chunk_gives_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interest, "CPU_CHUNK", chunk)
    attention, ragged = build((3, 2)), Ragged([4, 0, 1, 8], 5)
    expected = plain(attention, *ragged.inputs, torch.ones(5, dtype=torch.bool))
    found = results(attention(*ragged.inputs), attention, ragged)
    for one, other in zip(found, results(expected, attention, ragged), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("hidden", "normalize"), itertools.product([(), (3,), (3, 2)], ["softmax", "none"]))
def test_gradients_by_finite_differences(hidden: tuple[int, ...], normalize: str) -> None:
    attention, ragged = build(hidden, normalize), Ragged([2, 0, 3], 3)
    parameters = list(attention.parameters())

    def run(query_BD: Tensor, key_VD: Tensor, *_: Tensor) -> Tensor:
        return attention(query_BD, key_VD, ragged.row_N, ragged.lengths_B)

    assert torch.autograd.gradcheck(run, (ragged.query_BD, ragged.key_VD, *parameters))


def test_query_of_another_width_and_int32_lengths() -> None:
    attention, ragged = build((3,), query_dim=6), Ragged([2, 1], 3, query_dim=6)
    expected = plain(attention, *ragged.inputs, torch.ones(3, dtype=torch.bool))
    found = attention(ragged.query_BD, ragged.key_VD, ragged.row_N, ragged.lengths_B.int())
    torch.testing.assert_close(found, expected)


def test_invalid_items_are_left_out_whatever_they_hold() -> None:
    attention, ragged = build((3,)), Ragged([3, 2, 0], 4)
    valid_V = torch.tensor([True, False, True, True])
    before = results(attention(*ragged.inputs, valid_V), attention, ragged)
    ragged.key_VD.data[1] = torch.nan
    after = results(attention(*ragged.inputs, valid_V), attention, ragged)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert not attention(*ragged.inputs, torch.zeros(4, dtype=torch.bool)).any()


def test_large_scores_stay_finite() -> None:
    attention, ragged = build((3,)), Ragged([5, 3], 4)
    with torch.no_grad():
        ragged.key_VD *= 1e6
    found = results(attention(*ragged.inputs), attention, ragged)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)


def test_float32_agrees_with_float64_at_full_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interest, "CPU_CHUNK", 64)
    attention, ragged = build((8,)), Ragged([40, 0, 33, 71], 20)
    exact = attention(*ragged.inputs)
    single = attention.float()(ragged.query_BD.float(), ragged.key_VD.float(), ragged.row_N, ragged.lengths_B)
    torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-5)


def test_refuses_broken_options() -> None:
    with pytest.raises(ConfigError, match="widths"):
        TargetAttention(4, 4, (8, 0))
    with pytest.raises(ConfigError, match="normalize"):
        TargetAttention(4, 4, (8,), "sigmoid")
