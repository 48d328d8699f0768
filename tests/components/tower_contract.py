"""What every content tower must do, built-in or a user's: `check_tower` asserts all of it.

from tests.components.tower_contract import DIMS, COUNTS, WIDTH, check_tower

def test_mine() -> None:
    check_tower(MyTower(MyOptions(), DIMS, COUNTS, WIDTH))

Shape letters: U items, T tokens, I width of a token, D width of the model.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.interfaces import output_width

__all__ = ["COUNTS", "DIMS", "WIDTH", "check_tower", "fill", "random_tokens"]

DIMS = {"text": 12, "image": 7}
COUNTS = {"text": 5, "image": 3}
WIDTH = 8

Tokens = Mapping[str, ModalityTokens]


def random_tokens(num_items: int, seed: int = 0, share: float = 0.7) -> dict[str, ModalityTokens]:
    """Return tokens of which `share` are valid; item 0 lacks text, item 1 images, item 2 both, where there are such."""
    generator = torch.Generator().manual_seed(seed)
    tokens = {}
    for place, (name, dim) in enumerate(DIMS.items()):
        valid_UT = torch.rand(num_items, COUNTS[name], generator=generator) < share
        valid_UT[:, 0] = True
        valid_UT[place : place + 1] = valid_UT[2:3] = False
        tokens[name] = ModalityTokens(torch.randn(num_items, COUNTS[name], dim, generator=generator), valid_UT)
    return tokens


def fill(tokens: Tokens, filler: Callable[[Tensor], Tensor]) -> dict[str, ModalityTokens]:
    """Return the tokens with `filler(tokens_UTI)` where they are invalid."""
    return {
        name: ModalityTokens(torch.where(valid_UT[:, :, None], tokens_UTI, filler(tokens_UTI)), valid_UT)
        for name, (tokens_UTI, valid_UT) in tokens.items()
    }


def check_tower(tower: nn.Module) -> None:
    """Assert that `tower`, built for DIMS, COUNTS and WIDTH, keeps the contract of `interfaces.ContentTower`."""
    tower = copy.deepcopy(tower).eval()
    _check_shapes(tower)
    for share in (0.9, 0.3):
        _check_filler(tower, random_tokens(20, share=share))
    _check_width_of_rows(tower)
    _check_items_are_independent(tower)
    _check_gradients(tower)


def _check_shapes(tower: nn.Module) -> None:
    for num_items in (0, 1, 2, 9):
        content_UD = tower(random_tokens(num_items))
        assert content_UD.shape == (num_items, output_width(tower, WIDTH))
        assert content_UD.dtype == torch.float32
        assert torch.isfinite(content_UD).all()


def _check_width_of_rows(tower: nn.Module) -> None:
    """A store hands on rows as wide as the longest item asked for: the same items, whatever they are fetched with."""
    short = {name: ModalityTokens(x[:, :2], valid[:, :2]) for name, (x, valid) in random_tokens(6).items()}
    padded = {
        name: ModalityTokens(x, functional.pad(short[name].valid_UT, (0, COUNTS[name] - 2)))
        for name, (x, _) in random_tokens(6).items()
    }
    assert tower(short).shape == (6, output_width(tower, WIDTH))
    torch.testing.assert_close(tower(short), tower(padded), rtol=1e-4, atol=1e-5)


def _check_filler(tower: nn.Module, tokens: Tokens) -> None:
    fillers: list[Callable[[Tensor], Tensor]] = [
        torch.zeros_like,
        torch.randn_like,
        lambda x: 1e4 * torch.randn_like(x),
        lambda x: torch.full_like(x, torch.nan),
        lambda x: torch.full_like(x, torch.inf),
    ]
    results = []
    for filler in fillers:
        tower.zero_grad()
        content_UD = tower(fill(tokens, filler))
        if content_UD.requires_grad:
            _loss(content_UD).backward()
        results.append([content_UD.detach(), *(parameter.grad.clone() for parameter in tower.parameters())])
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            assert torch.equal(expected, found), "an invalid token reached the content or a gradient"


def _loss(content_UD: Tensor) -> Tensor:
    """Return a loss to which the length of an item's content is not all; a tower may well hold that fixed."""
    return content_UD.pow(3).sum()


def _check_items_are_independent(tower: nn.Module) -> None:
    tokens, order = random_tokens(12, share=0.95), torch.randperm(12, generator=torch.Generator().manual_seed(1))[:5]
    some = {name: ModalityTokens(x[order], valid[order]) for name, (x, valid) in tokens.items()}
    torch.testing.assert_close(tower(some), tower(tokens)[order], rtol=1e-4, atol=1e-5)


def _check_gradients(tower: nn.Module) -> None:
    tower.zero_grad()
    tokens = {name: ModalityTokens(x.clone().requires_grad_(), v) for name, (x, v) in random_tokens(16).items()}
    _loss(tower(tokens)).backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
    for name, (tokens_UTI, valid_UT) in tokens.items():
        assert tokens_UTI.grad is not None
        reached_UT = tokens_UTI.grad.abs().sum(2) > 0
        assert torch.equal(reached_UT, valid_UT), f"the valid tokens of {name}, and no other, must have a gradient"
