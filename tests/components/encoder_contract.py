"""What every encoder must do, built-in or a user's: `check_encoder` asserts all of it, `check_cuts` what a cut adds.

from tests.components.encoder_contract import check_cuts, check_encoder

def test_mine() -> None:
    check_encoder(MyEncoder(MyOptions()), ["a text", "another, longer text", "third"])
    check_cuts(MyEncoder(MyOptions()), ["a text", "another, longer text", "third"], cuts=[0, 2])

Shape letters: n inputs, T tokens, D width, P rows at a cut, W width of a row.
"""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor, nn

from torchrec_em3.components.interfaces import CuttableEncoder, TokenEncoder

__all__ = ["check_cuts", "check_encoder"]


def check_encoder(encoder: TokenEncoder, inputs: Sequence[str] | Sequence[Image], tolerance: float = 1e-5) -> None:
    """Assert that `encoder` keeps the promises of `TokenEncoder`.

    Args:
        encoder: The encoder under test.
        inputs: At least three inputs, distinct and, where that can be, of different lengths.
        tolerance: How far tokens may move with the batch they come in, relative to the largest one.
    """
    assert len(inputs) >= 3
    assert encoder.modality in {"text", "image"}
    assert encoder.source
    tokens, lengths = encoder.encode(inputs)
    _check_form(encoder, tokens, lengths, len(inputs))
    again, _ = encoder.encode(inputs)
    assert torch.equal(tokens, again), "the same inputs must give the same tokens"
    _check_independence(encoder, inputs, tokens, lengths, tolerance)
    flat = tokens.flatten(1)
    nearest = torch.cdist(flat, flat).fill_diagonal_(float("inf")).min()
    assert nearest > 0, "different inputs must differ"


def _check_form(encoder: TokenEncoder, tokens_nTD: Tensor, lengths_n: Tensor, count: int) -> None:
    assert tokens_nTD.shape == (count, encoder.max_tokens, encoder.dim)
    assert tokens_nTD.dtype == torch.float32
    assert tokens_nTD.device.type == "cpu"
    assert lengths_n.shape == (count,)
    assert lengths_n.dtype == torch.int64
    assert lengths_n.min() >= 1
    assert lengths_n.max() <= encoder.max_tokens
    assert tokens_nTD.isfinite().all()
    assert not tokens_nTD.requires_grad
    assert not tokens_nTD.is_inference(), "a tower must be able to use the tokens in autograd"
    padding_nT = torch.arange(encoder.max_tokens) >= lengths_n[:, None]
    assert (tokens_nTD[padding_nT] == 0).all(), "tokens beyond the length must be zero"
    assert (tokens_nTD[~padding_nT] != 0).any(), "an encoder must not return zeros only"


def _check_independence(
    encoder: TokenEncoder,
    inputs: Sequence[str] | Sequence[Image],
    tokens_nTD: Tensor,
    lengths_n: Tensor,
    tolerance: float,
) -> None:
    """Each input alone, and all of them in reverse, must give what the batch gave."""
    bound = tolerance * max(1.0, float(tokens_nTD.abs().max()))
    for row in range(len(inputs)):
        alone, length = encoder.encode(inputs[row : row + 1])
        assert length[0] == lengths_n[row]
        assert (alone[0] - tokens_nTD[row]).abs().max() <= bound, f"input {row} depends on its batch"
    reverse, _ = encoder.encode(list(reversed(inputs)))  # type: ignore[arg-type]
    assert (reverse.flip(0) - tokens_nTD).abs().max() <= bound, "the order of the inputs matters"


def check_cuts(
    encoder: CuttableEncoder, inputs: Sequence[str] | Sequence[Image], cuts: Sequence[int], tolerance: float = 1e-5
) -> None:
    """Assert that prefix and suffix make the encoder's own tokens at each of `cuts`, and that all above can be trained.

    Args:
        encoder: The encoder under test.
        inputs: As for `check_encoder`.
        cuts: Some of 0 to `encoder.layers` - 1.
        tolerance: Largest difference from the encoder's tokens, relative to the largest of them.
    """
    tokens_nTD, lengths_n = encoder.encode(inputs)
    for cut in cuts:
        prefix, suffix = encoder.prefix(cut), encoder.suffix(cut)
        assert isinstance(suffix, nn.Module)
        suffix.eval().requires_grad_(True)
        assert len(suffix.layers) == encoder.layers - cut
        rows_nPW, counts_n = prefix.encode(inputs)
        assert rows_nPW.shape == (len(inputs), prefix.max_tokens, prefix.dim)
        assert prefix.dtype == (torch.float16 if cut else rows_nPW.dtype)
        assert rows_nPW.is_floating_point() == (cut > 0), "at cut 0 raw inputs are stored, as integers"
        found_nTD, valid_nT = suffix(rows_nPW, torch.arange(prefix.max_tokens) < counts_n[:, None])
        assert torch.equal(valid_nT, torch.arange(encoder.max_tokens) < lengths_n[:, None])
        bound = tolerance * max(1.0, float(tokens_nTD.abs().max()))
        assert (found_nTD.detach() - tokens_nTD).abs().max() <= bound, f"cut {cut} gives other tokens"
        found_nTD.square().sum().backward()
        unused = [name for name, weight in suffix.named_parameters() if weight.grad is None]
        assert not unused, f"cut {cut}: {unused[0]} gets no gradient, for which DistributedDataParallel would wait"
        untouched, _ = encoder.encode(inputs)
        assert torch.equal(untouched, tokens_nTD), "the suffix must be a copy"
