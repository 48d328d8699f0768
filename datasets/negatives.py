"""Items that a user never took, drawn for each positive event: arrays in, arrays out, no files.

Shape letters: E events, P positives of one draw, N negatives a positive, K negatives in all, C candidate items.
"""

import logging
from dataclasses import dataclass

import numpy as np

from torchrec_em3.datasets.splits import TEST, TRAIN, VALIDATION
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import closest

__all__ = ["NEGATIVE_SAMPLINGS", "Negatives", "check_sampling", "sample_negatives"]

NEGATIVE_SAMPLINGS = ("popularity", "uniform")

logger = logging.getLogger(__name__)

_CHUNK = 1 << 17  # positives drawn for at a time, to bound the memory
_ROUNDS = 30  # of drawing again what cannot stay, before the remaining rows are drawn one by one


@dataclass(frozen=True)
class Negatives:
    """Negatives, those of one positive side by side.

    Attributes:
        positive: Number of the positive event that each negative belongs to, int64 [K].
        item: The item, int64 [K].
    """

    positive: np.ndarray
    item: np.ndarray


def check_sampling(name: str) -> None:
    """Raise ConfigError if there is no sampling of that name."""
    if name not in NEGATIVE_SAMPLINGS:
        known = list(NEGATIVE_SAMPLINGS)
        raise ConfigError(
            f"option negative_sampling is '{name}', must be one of {', '.join(known)}.{closest(name, known)}"
        )


def sample_negatives(
    user: np.ndarray,
    item: np.ndarray,
    label: np.ndarray,
    split: np.ndarray,
    *,
    num: int,
    sampling: str,
    seed: int,
) -> Negatives:
    """Draw `num` different items for each event with label 1, never one that its user has an event with at any time.

    The candidates of a split are the items of its own positives. So training learns nothing of what only the test part
    holds, and items that never train are compared with their like. With `popularity` a candidate is drawn in proportion
    to its positives in the split, which makes popularity alone useless for telling positives from negatives.

    Args:
        user: User of each event, integers [E].
        item: Item of each event, integers >= 0 [E].
        label: 1 for positives, [E].
        split: Split of each event, [E].
        num: Negatives a positive; fewer only for users who took nearly every candidate.
        sampling: One of `NEGATIVE_SAMPLINGS`.
        seed: The same seed and events give the same negatives.

    Raises:
        ConfigError: If the sampling is unknown.
    """
    check_sampling(sampling)
    num_items = int(item.max(initial=-1)) + 1
    taken = np.unique(user.astype(np.int64) * num_items + item)
    random = np.random.default_rng([seed, num])
    found = [Negatives(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
    for part in (TRAIN, VALIDATION, TEST):
        positives = np.flatnonzero((label == 1) & (split == part))
        candidates, counts = np.unique(item[positives], return_counts=True)
        draw = _Draw(candidates, counts if sampling == "popularity" else np.ones_like(counts), taken, num_items)
        for start in range(0, len(positives), _CHUNK):
            chunk = positives[start : start + _CHUNK]
            item_PN = draw.rows(user[chunk].astype(np.int64), num, random)
            drawn_PN = item_PN >= 0
            found.append(Negatives(np.repeat(chunk, drawn_PN.sum(1)), item_PN[drawn_PN]))
    drawn = Negatives(np.concatenate([one.positive for one in found]), np.concatenate([one.item for one in found]))
    wanted = num * int((label == 1).sum())
    if len(drawn.item) < wanted:
        missing = wanted - len(drawn.item)
        logger.warning("%d of %d negatives could not be drawn: users took nearly every candidate", missing, wanted)
    return drawn


class _Draw:
    """Draws from the weighted candidates of one split."""

    def __init__(self, candidates: np.ndarray, weights: np.ndarray, taken: np.ndarray, num_items: int) -> None:
        self._candidates_C, self._weights_C = candidates.astype(np.int64), weights
        self._cumulated_C = np.cumsum(weights)
        self._taken, self._num_items = taken, num_items

    def rows(self, user_P: np.ndarray, num: int, random: np.random.Generator) -> np.ndarray:
        """Return `num` items for each user, int64 [P, N]; -1 where no candidate is left."""
        item_PN = np.full((len(user_P), num), -1, dtype=np.int64)
        open_P = np.arange(len(user_P))
        for _ in range(_ROUNDS):
            wrong_PN = self._wrong(user_P[open_P], item_PN[open_P])
            rows, columns = np.nonzero(wrong_PN)
            if not len(rows):
                return item_PN
            place = np.searchsorted(self._cumulated_C, random.integers(self._cumulated_C[-1], size=len(rows)), "right")
            item_PN[open_P[rows], columns] = self._candidates_C[place]
            open_P = open_P[np.unique(rows)]
        left_P = open_P[self._wrong(user_P[open_P], item_PN[open_P]).any(1)]
        for row in left_P.tolist():
            item_PN[row] = self._one_row(int(user_P[row]), num, random)
        return item_PN

    def _wrong(self, user_P: np.ndarray, item_PN: np.ndarray) -> np.ndarray:
        """Mark what is not drawn yet, what the user took, and what stands further left in the same row already."""
        key_PN = user_P[:, None] * self._num_items + item_PN
        place_PN = np.minimum(np.searchsorted(self._taken, key_PN), len(self._taken) - 1)
        wrong_PN = (item_PN < 0) | (self._taken[place_PN] == key_PN)
        for column in range(1, item_PN.shape[1]):
            wrong_PN[:, column] |= (item_PN[:, :column] == item_PN[:, column, None]).any(1)
        return wrong_PN

    def _one_row(self, user: int, num: int, random: np.random.Generator) -> np.ndarray:
        """Draw for a user who took so much that drawing again would take long."""
        free_C = ~np.isin(user * self._num_items + self._candidates_C, self._taken)
        candidates, weights = self._candidates_C[free_C], self._weights_C[free_C]
        count = min(num, len(candidates))
        row_N = np.full(num, -1, dtype=np.int64)
        if count:
            row_N[:count] = random.choice(candidates, count, replace=False, p=weights / weights.sum())
        return row_N
