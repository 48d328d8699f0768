"""What every alignment loss must do, built-in or a user's: `check_alignment(loss, width)` asserts all of it.

from tests.components.alignment_contract import check_alignment

def test_mine() -> None:
    check_alignment(MyAlignment(MyOptions(), 16), width=16)
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Example", "check_alignment", "example"]


class Example(NamedTuple):
    """Inputs of an alignment loss for one rank."""

    content_UD: Tensor
    id_UD: Tensor
    item_U: Tensor
    count_U: Tensor


def example(num_items: int, width: int, seed: int = 0) -> Example:
    """Return distinct items in no order, with ids that float32 cannot tell apart."""
    generator = torch.Generator().manual_seed(seed)
    content_UD, id_UD = torch.randn(2, num_items, width, generator=generator)
    item_U = torch.randperm(3 * num_items, generator=generator)[:num_items] + 2**24
    count_U = torch.randint(1, 5, (num_items,), generator=generator)
    return Example(content_UD.requires_grad_(), id_UD.requires_grad_(), item_U, count_U)


def check_alignment(loss: nn.Module, width: int) -> None:
    """Assert that `loss` keeps the contract of `torchrec_em3.components.interfaces.AlignmentLoss` on one rank.

    Args:
        loss: The module under test; it is not changed.
        width: Width that it was built for.
    """
    _check_value_and_gradients(copy.deepcopy(loss), width)
    _check_too_few_items(copy.deepcopy(loss), width)
    _check_extreme_vectors(copy.deepcopy(loss), width)
    _check_descent(copy.deepcopy(loss), width)
    _check_state(copy.deepcopy(loss), width)


def _value(loss: nn.Module, inputs: Example) -> Tensor:
    torch.manual_seed(0)
    value: Tensor = loss(*inputs)
    return value


def _check_value_and_gradients(loss: nn.Module, width: int) -> None:
    inputs = example(17, width)
    before = [value.detach().clone() for value in inputs]
    value = _value(loss, inputs)
    assert value.shape == (), "the loss must be a scalar"
    assert torch.isfinite(value)
    assert value > 0, "random vectors are not aligned"
    assert torch.equal(value, _value(loss, inputs)), "the same inputs and seed must give the same loss"
    value.backward()
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then), "inputs must not be changed"
    sides = [inputs.content_UD.grad, inputs.id_UD.grad]
    assert any(side is not None and side.abs().sum() > 0 for side in sides), "no side gets a gradient"
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        assert torch.equal(_value(loss, inputs), value), "the loss must not depend on whether gradients are recorded"


def _check_too_few_items(loss: nn.Module, width: int) -> None:
    """A rank without items still takes part: DDP waits for the gradient of every parameter."""
    for num_items in (0, 1):
        loss.zero_grad()
        inputs = example(num_items, width)
        value = _value(loss, inputs)
        assert value == 0, f"{num_items} items have nothing to be told from, yet the loss is {value}"
        value.backward()
        for name, parameter in loss.named_parameters():
            assert parameter.grad is not None, f"{name} is not in the graph with {num_items} items"
            assert not parameter.grad.any(), f"{name} gets a gradient from {num_items} items"
        for side in (inputs.content_UD.grad, inputs.id_UD.grad):
            assert side is None or not side.any()


def _check_extreme_vectors(loss: nn.Module, width: int) -> None:
    for factor in (0.0, 1e-12, 1e6):
        inputs = example(9, width)
        value = _value(loss, inputs._replace(content_UD=inputs.content_UD * factor))
        value.backward()
        assert torch.isfinite(value), f"content times {factor}"
        for name, parameter in loss.named_parameters():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all(), f"gradient of {name} with content times {factor}"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(_value(loss, example(9, width)))


def _check_descent(loss: nn.Module, width: int) -> None:
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    inputs = example(17, width)
    before = _value(loss, inputs)
    for _ in range(5):
        optimizer.zero_grad()
        _value(loss, inputs).backward()
        optimizer.step()
    assert _value(loss, inputs) < before, "steps along the gradient must lower the loss"


def _check_state(loss: nn.Module, width: int) -> None:
    inputs, saved, before = example(17, width), copy.deepcopy(loss.state_dict()), _value(loss, example(17, width))
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(0.5)
    loss.load_state_dict(saved)
    assert torch.equal(_value(loss, inputs), before), "a loaded state must give the same loss"
