"""What every ranker must do, built-in or a user's: `check_ranker` asserts all of it.

from tests.components.ranker_contract import BLOCK_DIMS, check_ranker

def test_mine() -> None:
    check_ranker(MyRanker(MyOptions(), BLOCK_DIMS))
    check_ranker(MyRanker(MyOptions(), BLOCK_DIMS, 2), num_tasks=2)

Shape letters: B rows; logits are [B] for one task, else [B, K].
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


def check_ranker(ranker: nn.Module, num_tasks: int = 1) -> None:
    """Assert that `ranker`, built for BLOCK_DIMS and that many tasks, keeps the contract of `interfaces.Ranker`."""
    ranker = copy.deepcopy(ranker).eval()
    for num_rows in (0, 1, 7):
        logits = ranker(random_blocks(num_rows))
        assert logits.shape == ((num_rows,) if num_tasks == 1 else (num_rows, num_tasks))
        assert torch.isfinite(logits).all()
    blocks = {name: block.requires_grad_() for name, block in random_blocks(7).items()}
    logits = ranker(blocks)
    assert torch.equal(ranker(dict(reversed(blocks.items()))), logits), (
        "the order of the blocks at a call must not matter"
    )
    alone = {name: block[3:4] for name, block in blocks.items()}
    torch.testing.assert_close(ranker(alone), logits[3:4], msg="a row must not depend on other rows")
    for task, logits_B in enumerate(logits.view(7, num_tasks).unbind(1)):
        gradients = torch.autograd.grad(logits_B.sum(), list(blocks.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(blocks, gradients, strict=True):
            reached = gradient is not None and bool(gradient.any())
            assert reached, f"block {name} does not reach the logits of task {task}"
    logits.sum().backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
