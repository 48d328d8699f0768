"""A random choice of items that every rank would make alike.

Shape letters: U items.
"""

from torch import Tensor

__all__ = ["draw_items"]

# Odd 64-bit constants as int64: torch's integers wrap, and the mixing is that of the hash "splitmix64".
_ITEM, _STEP, _SEED = -7046029254386353131, 7455107161863376737, 2685821657736338717
_ROUNDS = ((30, -4658895280553007687), (27, -7723592293110705685))
_BITS = 24  # what a float32 holds exactly


def draw_items(item_U: Tensor, share: float, step: int, seed: int) -> Tensor:
    """Choose about `share` of the items; return which, drawn_U.

    Whether an item is chosen depends on the item, the step and the seed alone, so it does not matter which rank asks.

    Args:
        item_U: Catalogue rows, int64.
        share: Chance of an item to be chosen, in [0, 1].
        step: Another step is another draw.
        seed: Another seed is another row of draws.
    """
    mixed_U = item_U * _ITEM + _wrapped(step * _STEP + seed * _SEED)
    for shift, factor in _ROUNDS:
        mixed_U = (mixed_U ^ _shifted(mixed_U, shift)) * factor
    return _shifted(mixed_U, 64 - _BITS) < share * 2**_BITS


def _shifted(value_U: Tensor, bits: int) -> Tensor:
    """Shift right as if the numbers had no sign."""
    return (value_U >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(value: int) -> int:
    """Return the number that an int64 would have become."""
    return (value + 2**63) % 2**64 - 2**63
