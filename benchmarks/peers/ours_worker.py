"""This project: ID-only or EM3, through the loader and the pipeline that training uses; runs in its own environment.

Shape letters: U users with row 0, R rows, L longest history and the target.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Task, cycle, serve
from rows import Rows
from synthetic import write_synthetic

from torchrec_em3.batch import Batch
from torchrec_em3.build import build_sharded
from torchrec_em3.config import Config, LoaderConfig, ModelConfig
from torchrec_em3.datasets.loader import BatchStream, batch_loader
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.evaluate import refresh_bank
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import Ranks, process_group


@dataclass(frozen=True)
class _RowData(PreparedData):
    """A prepared folder whose training split is the rows: each user's events are the history and then the target."""

    rows: Rows

    @classmethod
    def of(cls, rows: Rows, folder: Path, modalities: Mapping[str, Any]) -> "_RowData":
        users, items = rows.num_users, rows.num_items
        counts = {"users": users, "items": items, "known_users": users, "known_items": items}
        features = [{"name": "user", "rows": users + 1}]
        tasks = [{"name": "label"}]
        meta = {"counts": counts, "user_features": features, "modalities": modalities, "tasks": tasks}
        return cls(folder, meta, rows)

    @cached_property
    def history_offsets(self) -> np.ndarray:
        events_U = np.zeros(self.user_rows, dtype=np.int64)
        events_U[self.rows.user] = self.rows.length + 1
        return np.concatenate([[0], np.cumsum(events_U)])

    @cached_property
    def history_items(self) -> np.ndarray:
        rows = self.rows
        events_RL = np.pad(rows.history, ((0, 0), (0, 1)))
        events_RL[np.arange(len(rows.length)), rows.length] = rows.item
        is_event_RL = np.arange(events_RL.shape[1]) <= rows.length[:, None]
        by_user = np.argsort(rows.user)
        return events_RL[by_user][is_event_RL[by_user]].astype(np.int32)

    @cached_property
    def user_features(self) -> np.ndarray:
        return np.zeros((self.user_rows, 0), dtype=np.int32)

    def split_rows(self, split: Split, first: int = 0, end: int | None = None) -> dict[str, np.ndarray]:
        assert (split, first, end) == ("train", 0, None)
        rows = self.rows
        return {
            "user": rows.user.astype(np.int32),
            "item": rows.item.astype(np.int32),
            "label": rows.label.astype(np.int8),
            "history_end": self.history_offsets[rows.user] + rows.length,
        }


class _Ours:
    def __init__(self, rows: Rows, task: Task, ranks: Ranks) -> None:
        config = _config(rows, task)
        folder, modalities = Path(task.folder), {}
        if config.uses_content:
            # Only for the tokens of the items; its events are not used.
            folder = write_synthetic(folder / "data", num_users=10, num_items=rows.num_items, num_events=1000)
            modalities = PreparedData.open(folder).meta["modalities"]
        data = _RowData.of(rows, folder, modalities)
        stream = BatchStream(data, "train", batch_size=rows.batch_size, max_history=config.loader.max_history)
        sharded = build_sharded(config, data, ranks)
        refresh_bank(sharded, ranks)  # as after an epoch: otherwise every target would still have to be encoded
        self._ready, self._loaded = cycle(list(stream)), _endless(stream)
        self._bare, self._full = (CheckedPipeline(sharded, ranks) for _ in range(2))

    def bare(self, steps: int) -> float:
        return self._train(self._bare, self._ready, steps)

    def full(self, steps: int) -> float:
        return self._train(self._full, self._loaded, steps)

    def _train(self, pipeline: CheckedPipeline, batches: Iterator[Batch], steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            loss = pipeline.progress(batches).metrics["loss"]
        return loss.item()


def _config(rows: Rows, task: Task) -> Config:
    return resolve_parts(
        Config(
            loader=LoaderConfig(batch_size=rows.batch_size, max_history=rows.history.shape[1]),
            model=ModelConfig(
                embedding_dim=task.embedding_dim,
                attention_hidden=tuple(task.attention_hidden),
                ranker_options={"hidden": tuple(task.hidden)},
                **task.options,
            ),
        )
    )


def _endless(stream: BatchStream) -> Iterator[Batch]:
    while True:
        yield from batch_loader(stream)


def main() -> None:
    """Serve as a worker, in a process group of one."""
    with process_group() as ranks:
        serve(lambda rows, task: _Ours(rows, task, ranks), packages=("torchrec-em3", "torch", "torchrec"))


if __name__ == "__main__":
    main()
