"""From a prepared folder to batches: sharded by rank, shuffled by seed and epoch, resumable at any row.

Shape letters: B rows of a batch on one rank, N history positions, F features (of users, or dense), R rows of the split,
K tasks, U user rows.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.batch import HISTORY, TARGET, Batch
from torchrec_em3.datasets.event_features import dense_column, sparse_column
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.datasets.raw_ids import user_ids
from torchrec_em3.datasets.recent_events import ShardRows
from torchrec_em3.datasets.strata_order import StrataOrder
from torchrec_em3.errors import DataError

__all__ = ["BatchStream", "batch_loader"]


class BatchStream(IterableDataset[Batch]):
    """The rows of one split as a stream of batches for one rank.

    A step's global batch is a run of `world_size * batch_size` rows of the epoch's order, of which rank r takes the
    r-th part; so the order of rows is the same for any number of ranks, and a position is just an epoch and a row.
    Training drops the last incomplete global batch of an epoch; evaluation fills it up with rows of weight 0.

    Shuffled by strata, a rank reads only its part of the training rows (`strata_order.py`); else it reads all.
    """

    def __init__(
        self,
        data: PreparedData | ShardRows,
        split: Split,
        *,
        batch_size: int,
        max_history: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        raw_users: bool = False,
        shuffle: Literal["rows", "strata"] = "rows",
    ) -> None:
        """Read the split's columns into memory, or this rank's part; ids and labels have been checked to be in range.

        Args:
            data: The prepared folder, or a shard.
            split: "train" is shuffled anew each epoch; the others keep time order.
            batch_size: Rows per step on each rank.
            max_history: Most recent events of the user that a row sees.
            rank: Number of this process.
            world_size: Number of processes.
            seed: Seed of the shuffle.
            raw_users: Deliver the raw id of every user in place of the row in the vocabulary, which only users with
                training rows have.
            shuffle: How training rows of a prepared folder are shuffled.

        Raises:
            ConfigError: If the strata do not fit the steps.
            DataError: If the split is damaged, or the training split is smaller than one global batch.
        """
        self._training = split == "train"
        self._batch_size = batch_size
        self._max_history = max_history
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._known_items = data.known_items
        row_U = np.arange(len(data.history_offsets) - 1)
        # What stands for each user row in a batch, [U].
        self._user_id = user_ids(data) if raw_users else np.where(row_U <= data.known_users, row_U, 0)
        self._user_features = data.user_features
        self._offsets, self._history = data.history_offsets, data.history_items
        self._strata: StrataOrder | None = None
        if self._training and shuffle == "strata" and isinstance(data, PreparedData):
            self._num_rows = int(data.meta["counts"][split])
            self._strata = StrataOrder(self._num_rows, seed, rank=rank, world_size=world_size, batch_size=batch_size)
            mine = self._strata.rows
            columns = data.split_rows(split, mine.start, mine.stop)
        else:
            columns = data.split_rows(split)
            self._num_rows = len(columns["user"])
        self._of_event = [*(sparse_column(feature.name) for feature in data.sparse_features), "item"]
        self._columns = {name: columns[name] for name in ("user", "history_end", *self._of_event)}
        labels = [columns[name] for name in data.label_columns]
        # [R] where there is one task, else [R, K].
        self._labels = labels[0] if len(labels) == 1 else np.stack(labels, axis=1)
        self._dense_RF = np.empty((len(columns["user"]), len(data.dense_features)), dtype=np.float32)
        for place, feature in enumerate(data.dense_features):
            self._dense_RF[:, place] = feature.standardise(columns[dense_column(feature.name)])
        sparse = [feature.name for feature in data.sparse_features]
        self._keys = [*data.user_feature_names, *sparse, TARGET, HISTORY]
        self.seek(0)
        self._check_size(data)

    @property
    def num_rows(self) -> int:
        """Rows of the split, over all ranks."""
        return self._num_rows

    @property
    def global_batch_size(self) -> int:
        """Rows of one step over all ranks."""
        return self._batch_size * self._world_size

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        if self._training:
            return self.num_rows // self.global_batch_size
        return -(-self.num_rows // self.global_batch_size)

    def seek(self, epoch: int, row: int = 0) -> None:
        """Make the next iteration start at `row` of the order of `epoch`."""
        self._epoch, self._row, self._row_is_own = epoch, row, False

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch (of this loader process, where there are several)."""
        return {"epoch": self._epoch, "row": self._row, "row_is_own": self._row_is_own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned."""
        self._epoch, self._row, self._row_is_own = state["epoch"], state["row"], state["row_is_own"]

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from the current position to the end of the epoch, then stand at the next epoch."""
        order = self._order()
        worker = get_worker_info()
        every, place = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        size = self.global_batch_size
        first = self._row if self._row_is_own else self._row + place * size
        last = self.num_rows - size + 1 if self._training else self.num_rows
        for start in range(first, last, every * size):
            self._row, self._row_is_own = start + every * size, True
            yield self._collate(*self._share(order, start))
        self.seek(self._epoch + 1)

    def _order(self) -> np.ndarray:
        if self._strata is not None:
            return self._strata.order(self._epoch)
        if not self._training:
            return np.arange(self.num_rows)
        return np.random.default_rng((self._seed, self._epoch)).permutation(self.num_rows)

    def _share(self, order: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's rows of a global batch, filled up to the same number on every rank, and their weights.

        The weights of all ranks sum to the number of rows with the filler, so a weighted mean over each rank's rows is,
        in the mean over ranks, that of the rows without it.
        """
        if self._strata is not None:
            row_B = self._strata.share(order, start, self.global_batch_size)
            return row_B, np.ones(len(row_B), dtype=np.float32)
        rows = order[start : start + self.global_batch_size]
        per_rank = -(-len(rows) // self._world_size)
        mine = rows[self._rank * per_rank : (self._rank + 1) * per_rank]
        filler = np.repeat(rows[:1], per_rank - len(mine))
        real = self._world_size * per_rank / len(rows)
        weight_B = np.repeat(np.array([real, 0.0], dtype=np.float32), [len(mine), len(filler)])
        return np.concatenate([mine, filler]), weight_B

    def _collate(self, row_B: np.ndarray, weight_B: np.ndarray) -> Batch:
        user_B = self._columns["user"][row_B]
        history_N, length_B = self._histories(user_B, self._columns["history_end"][row_B])
        of_event = [self._columns[name][row_B] for name in self._of_event]
        values = np.concatenate(
            [self._user_id[user_B], self._user_features[user_B].T.reshape(-1), *of_event, history_N]
        )
        ones = np.ones(len(row_B) * (len(self._keys) - 1), dtype=np.int64)
        return Batch(
            sparse=KeyedJaggedTensor(
                keys=self._keys,
                values=torch.from_numpy(values.astype(np.int64)),
                lengths=torch.from_numpy(np.concatenate([ones, length_B])),
            ),
            dense=torch.from_numpy(self._dense_RF[row_B]),
            label=torch.from_numpy(self._labels[row_B].astype(np.float32)),
            weight=torch.from_numpy(weight_B),
            user=torch.from_numpy(user_B.astype(np.int64)),
        )

    def _histories(self, user_B: np.ndarray, end_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the items before each row's event, most recent last, and how many each row has."""
        start_B = np.maximum(self._offsets[user_B], end_B - self._max_history)
        length_B = end_B - start_B
        first_B = np.cumsum(length_B) - length_B
        history_N = self._history[np.arange(length_B.sum()) + np.repeat(start_B - first_B, length_B)]
        if self._training:
            # Items kept out of training (split cold_items) are kept out of its histories too.
            known_N = history_N <= self._known_items
            if not known_N.all():
                row_N = np.repeat(np.arange(len(length_B)), length_B)
                history_N, length_B = history_N[known_N], np.bincount(row_N[known_N], minlength=len(length_B))
        return history_N, length_B.astype(np.int64)

    def _check_size(self, data: PreparedData | ShardRows) -> None:
        if self._training and self.num_rows < self.global_batch_size:
            raise DataError(
                f"split train of {data.folder} has {self.num_rows} rows, "
                f"fewer than one step of {self.global_batch_size}; "
                "lower --loader.batch_size"
            )


def batch_loader(stream: BatchStream, num_workers: int = 0) -> StatefulDataLoader[Batch]:
    """Return a resumable loader over `stream`; its `state_dict` counts batches handed out, not batches trained."""
    # A generator of its own: each new iterator draws a number, which must not shift the random numbers of training.
    return StatefulDataLoader(stream, batch_size=None, num_workers=num_workers, generator=torch.Generator())
