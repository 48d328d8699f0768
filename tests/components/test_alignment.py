"""The tiled contrastive loss on one process: exact against a float64 restatement, safe at the edges, small."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_em3.components.alignment.info_nce import info_nce
from torchrec_em3.errors import ConfigError, NumericError

WIDTH = 16


def reference(content: Tensor, id_: Tensor, item: Tensor, scale: Tensor, weight: Tensor, log_q: Tensor) -> Tensor:
    content, id_, scale, weight, log_q = (value.double() for value in (content, id_, scale, weight, log_q))
    similarity = scale * content @ id_.T
    differ = item[:, None] != item[None, :]
    negative = weight * torch.exp(-log_q)
    odds = torch.exp(similarity) * differ
    from_content = (odds * negative[None, :]).sum(1) * torch.exp(-similarity.diagonal())
    from_id = (odds * negative[:, None]).sum(0) * torch.exp(-similarity.diagonal())
    return (weight * (torch.log1p(from_content) + torch.log1p(from_id))).sum() / (2 * weight.sum())


def unit(
    num_items: int, width: int = WIDTH, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors that are alike, as content and ID are during training."""
    generator = torch.Generator().manual_seed(seed)
    shared, own, other = torch.randn(3, num_items, width, dtype=torch.float64, generator=generator)
    content, id_ = (nn.functional.normalize(shared + 0.7 * noise, dim=1).to(dtype) for noise in (own, other))
    return content, id_


def solve(loss: Any, content: Tensor, id_: Tensor, item: Tensor, scale: float, *rest: Tensor) -> list[Tensor]:
    """Loss, gradients of both sides and of the scale."""
    inputs = [content.clone().requires_grad_(), id_.clone().requires_grad_()]
    inputs.append(torch.tensor(scale, dtype=content.dtype).requires_grad_())
    value = loss(inputs[0], inputs[1], item, inputs[2], *rest)
    value.backward()
    return [value.detach(), *(like.grad for like in inputs if like.grad is not None)]


def tiled(content: Tensor, id_: Tensor, item: Tensor, scale: Tensor, weight: Tensor, log_q: Tensor) -> Tensor:
    return info_nce(content, id_, item, scale, weight_N=weight, log_q_N=log_q, tile=32)


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Errors are relative to the largest entry: a single gradient entry may cancel to nothing."""
    assert len(got) == len(expected)
    for name, value, right in zip(("loss", "content", "id", "scale"), got, expected, strict=False):
        error = (value.double() - right.double()).abs().max() / right.double().abs().max().clamp_min(1e-35)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def items_of(num_items: int, repeats: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if repeats:
        return torch.randint(0, max(1, num_items // 2), (num_items,), generator=generator)
    return torch.randperm(num_items, generator=generator)


@pytest.mark.parametrize("scale", [0.5, 1.0, 14.0, 40.0, 41.0, 100.0, 300.0])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("num_items", [2, 33, 131])
def test_equals_the_reference(num_items: int, repeats: bool, scale: float) -> None:
    item = items_of(num_items, repeats)
    weight, log_q = torch.rand(2, num_items, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = weight + 0.1
    if num_items > 2:
        weight[:5] = 0.0
    expected = solve(reference, *unit(num_items), item, scale, weight, log_q)
    assert_near(solve(tiled, *unit(num_items), item, scale, weight, log_q), expected, 1e-11)
    single = solve(tiled, *unit(num_items, dtype=torch.float32), item, scale, weight.float(), log_q.float())
    exact = solve(reference, *unit(num_items, dtype=torch.float32), item, scale, weight.float(), log_q.float())
    assert [value.dtype for value in single] == [torch.float32] * 4
    assert_near(single, exact, 1e-5)


@pytest.mark.parametrize("item", [[], [7], [7, 7, 7, 7, 7]])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_no_two_items_give_exactly_zero(item: list[int], scale: float) -> None:
    solved = solve(info_nce, *unit(len(item)), torch.tensor(item, dtype=torch.int64), scale)
    assert len(solved) == 4
    for value in solved:
        assert not value.any()


@pytest.mark.parametrize("scale", [40.0, 100.0])
def test_a_loss_near_zero_keeps_its_digits(scale: float) -> None:
    content, _ = unit(200, width=128, dtype=torch.float32)
    item, ones = torch.arange(200), torch.ones(200)
    expected = solve(reference, content, content, item, scale, ones, torch.zeros(200))
    similarity = scale * content @ content.T
    plain = nn.functional.cross_entropy(similarity, item)
    assert abs(plain - expected[0]) / expected[0] > 0.01, "the case is meant to be hard"
    assert_near(solve(info_nce, content, content, item, scale), expected, 1e-5)


def test_repeats_equal_unique_items_with_weights() -> None:
    content, id_ = unit(40)
    item = torch.randint(0, 40, (150,), generator=torch.Generator().manual_seed(0))
    distinct, counts = item.unique(return_counts=True)

    def of_rows(a: Tensor, b: Tensor, _: Tensor, scale: Tensor) -> Tensor:
        return info_nce(a[item], b[item], item, scale, tile=32)

    def of_items(a: Tensor, b: Tensor, _: Tensor, scale: Tensor) -> Tensor:
        return info_nce(a[distinct], b[distinct], distinct, scale, weight_N=counts.double(), tile=32)

    assert_near(solve(of_rows, content, id_, item, 14.0), solve(of_items, content, id_, item, 14.0), 1e-12)


@pytest.mark.parametrize("first", [2**24, 2**53])
def test_items_that_floats_merge_stay_apart(first: int) -> None:
    content, id_ = unit(2)
    loss = info_nce(content, id_, torch.tensor([first, first + 1]), 5.0)
    assert_near([loss], [info_nce(content, id_, torch.tensor([0, 1]), 5.0)], 1e-15)
    assert loss > 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.floats(0.1, 120.0), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(items: list[int], scale: float, random: Any) -> None:
    content, id_ = unit(len(items))
    order = torch.tensor(random.sample(range(len(items)), len(items)))
    item = torch.tensor(items)

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return info_nce(a, b, c, d, tile=8)

    first, second = solve(loss, content, id_, item, scale), solve(loss, content[order], id_[order], item[order], scale)
    for value, moved in zip(first, second, strict=True):
        expected = value[order] if value.ndim == 2 else value
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


class Recorder(TorchDispatchMode):
    """Counts operators and keeps the largest storage that any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest_bytes = max(self.largest_bytes, value.untyped_storage().nbytes())
        return result


def test_nothing_of_size_n_by_n_is_allocated() -> None:
    num_items, width = 16384, 64
    content, id_ = unit(num_items, width, torch.float32)
    with Recorder() as recorder:
        solve(info_nce, content, id_, torch.arange(num_items), 14.0)
    assert recorder.largest_bytes <= 4 * num_items * width, "one side is the largest thing that may exist"


def test_gradients_are_computed_only_where_needed() -> None:
    content, id_ = unit(70)
    calls = {}
    for name, sides, record in (("none", (), False), ("one", (content,), True), ("both", (content, id_), True)):
        for side in (content, id_):
            side.requires_grad_(any(side is wanted for wanted in sides))
        with torch.set_grad_enabled(record), Recorder() as recorder:
            info_nce(content, id_, torch.arange(70), 5.0, tile=70)
        calls[name] = recorder.calls["addmm_"]
    assert calls == {"none": 1, "one": 3, "both": 4}, (
        "products of one tile: similarities in each pass, and the gradients"
    )


def test_scale_alone_can_be_trained() -> None:
    content, id_ = unit(30)
    item, scale = torch.arange(30), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    info_nce(content, id_, item, scale).backward()
    assert scale.grad is not None
    expected = solve(reference, content, id_, item, 7.0, torch.ones(30), torch.zeros(30))
    torch.testing.assert_close(scale.grad, expected[3])


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    item = torch.arange(30)
    for dtype in (torch.bfloat16, torch.float16):
        content, id_ = unit(30, dtype=dtype)
        half = solve(info_nce, content, id_, item, 8.0)
        with torch.autocast("cpu", torch.bfloat16):
            cast = solve(info_nce, content, id_, item, 8.0)
        exact = solve(info_nce, content.float(), id_.float(), item, 8.0)
        assert [value.dtype for value in half] == [torch.float32, dtype, dtype, dtype]
        assert half[0] == exact[0] == cast[0]
        torch.testing.assert_close(half[1], exact[1].to(dtype), rtol=0, atol=0)


def test_a_loss_scaler_saves_half_precision_gradients_from_underflow() -> None:
    content, _ = unit(30, width=64, dtype=torch.float16)
    content.requires_grad_()
    loss = info_nce(content, content.detach(), torch.arange(30), 30.0)
    assert loss < 1e-7
    (loss * 2.0**20).backward()
    assert content.grad is not None
    assert content.grad.count_nonzero() > 0.9 * content.numel()


def test_upstream_gradient_is_applied_and_a_second_derivative_refused() -> None:
    content, id_ = unit(10)
    content.requires_grad_()
    once = torch.autograd.grad(info_nce(content, id_, torch.arange(10), 5.0), content)[0]
    loss = 3.0 * info_nce(content, id_, torch.arange(10), 5.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, content, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, content)[0], 3.0 * once)


def test_bad_arguments_are_refused() -> None:
    content, id_ = unit(4)
    item = torch.arange(4)
    for scale in (0.0, -1.0, 301.0):
        with pytest.raises(ConfigError, match=r"outside \(0, 300\]"):
            info_nce(content, id_, item, scale)
    with pytest.raises(NumericError, match="diverged"):
        info_nce(content, id_, item, math.nan)
    with pytest.raises(ValueError, match="int64"):
        info_nce(content, id_, item.float(), 1.0)
    with pytest.raises(ValueError, match=r"\(4, 16\) and ID \(3, 16\)"):
        info_nce(content, id_[:3], item, 1.0)
