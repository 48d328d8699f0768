"""What every ranker must do, built-in or a user's: `check_ranker` asserts all of it.

from tests.components.ranker_contract import BLOCK_DIMS, check_ranker

def test_mine() -> None:
    check_ranker(MyRanker(MyOptions(), BLOCK_DIMS))

Shape letters: B rows.
"""

import copy

import torch
from torch import Tensor, nn

__all__ = ["BLOCK_DIMS", "check_ranker", "random_blocks"]

BLOCK_DIMS = {"user": 6, "target": 4, "interest": 4, "content": 4, "context": 1}


def random_blocks(num_rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random blocks of the widths in BLOCK_DIMS."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_rows, width, generator=generator) for name, width in BLOCK_DIMS.items()}


def check_ranker(ranker: nn.Module) -> None:
    """Assert that `ranker`, built for BLOCK_DIMS, keeps the contract of `interfaces.Ranker`."""
    ranker = copy.deepcopy(ranker).eval()
    for num_rows in (0, 1, 7):
        logits_B = ranker(random_blocks(num_rows))
        assert logits_B.shape == (num_rows,)
        assert torch.isfinite(logits_B).all()
    blocks = {name: block.requires_grad_() for name, block in random_blocks(7).items()}
    logits_B = ranker(blocks)
    assert torch.equal(ranker(dict(reversed(blocks.items()))), logits_B), (
        "the order of the blocks at a call must not matter"
    )
    alone = {name: block[3:4] for name, block in blocks.items()}
    torch.testing.assert_close(ranker(alone), logits_B[3:4], msg="a row must not depend on other rows")
    logits_B.sum().backward()
    for name, block in blocks.items():
        assert block.grad is not None, f"block {name} does not reach the logits"
        assert bool((block.grad.abs().sum(0) > 0).any()), f"block {name} does not reach the logits"
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
