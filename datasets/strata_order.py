"""An order of training rows that any number of ranks can share, although each reads only a part of the rows.

Shape letters: Q rounds, S strata of this rank, B rows of a step on this rank.
"""

import numpy as np

from torchrec_em3.errors import ConfigError

__all__ = ["STRATA", "StrataOrder"]

STRATA = 64
"""Part of the order, as the seed is: with another number, runs could not be resumed in mid-epoch."""


class StrataOrder:
    """Rows in rounds of one row from each stratum: a stratum is a run of the split's rows, in a new order each epoch.

    The split is cut into STRATA runs of equal length. A step takes whole rounds, so its rows are a function of seed,
    epoch and position alone, and it has equally many of each stratum. Rank r takes those of the r-th part of the
    strata, which is one run of the split's rows whatever the epoch: it reads these once, and no others. Where STRATA is
    no multiple of the number of ranks, two neighbours share a stratum, and both read it.

    Rows that are left over, fewer than STRATA, are others in each epoch.
    """

    def __init__(self, num_rows: int, seed: int, *, rank: int, world_size: int, batch_size: int) -> None:
        """Find out which strata are this rank's.

        Args:
            num_rows: Rows of the split.
            seed: Seed of the order.
            rank: Number of this process.
            world_size: Number of processes.
            batch_size: Rows of a step on each rank.

        Raises:
            ConfigError: If a step over all ranks is not made of whole rounds.
        """
        if batch_size * world_size % STRATA:
            raise ConfigError(
                f"--loader.shuffle strata needs steps of a multiple of {STRATA} rows over all ranks, but "
                f"--loader.batch_size is {batch_size} on {world_size} of them; make it a multiple of {STRATA}"
            )
        self._bounds = [stratum * num_rows // STRATA for stratum in range(STRATA + 1)]
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._rounds = num_rows // STRATA
        self._strata = range(rank * STRATA // world_size, -(-(rank + 1) * STRATA // world_size))

    @property
    def rows(self) -> range:
        """Rows of the split that this rank needs."""
        return range(self._bounds[self._strata.start], self._bounds[self._strata.stop])

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows of each of this rank's strata in the order of an epoch, counted from `rows.start`, [Q, S]."""
        order_QS = np.empty((self._rounds, len(self._strata)), dtype=np.int64)
        for column, stratum in enumerate(self._strata):
            start, end = self._bounds[stratum : stratum + 2]
            shuffled = np.random.default_rng((self._seed, epoch, stratum)).permutation(end - start)
            order_QS[:, column] = shuffled[: self._rounds] + start - self.rows.start
        return order_QS

    def share(self, order_QS: np.ndarray, start: int, size: int) -> np.ndarray:
        """Return this rank's rows of a step, [B].

        Args:
            order_QS: What `order` returned.
            start: Rows of the epoch before the step, over all ranks; a multiple of STRATA.
            size: Rows of the step, over all ranks; a multiple of STRATA and of the number of ranks.
        """
        step = order_QS[start // STRATA : (start + size) // STRATA]
        per_rank = size // self._world_size
        first = self._rank * per_rank - self._strata.start * len(step)
        return step.T.reshape(-1)[first : first + per_rank]
