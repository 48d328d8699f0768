"""torch-rechub: its DIN, trained by its CTRTrainer; runs in torch-rechub's environment."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from protocol import Task, cycle, serve
from rows import Rows
from torch import Tensor
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

Loaded = tuple[dict[str, Tensor], Tensor]


class _TorchRechub:
    def __init__(self, rows: Rows, task: Task) -> None:
        width = task.embedding_dim
        model = DIN(
            features=[SparseFeature("user", rows.num_users + 1, width)],
            history_features=[
                SequenceFeature("history", rows.num_items + 1, width, "concat", shared_with="item", padding_idx=0)
            ],
            target_features=[SparseFeature("item", rows.num_items + 1, width, padding_idx=0)],
            mlp_params={"dims": task.hidden},
            attention_mlp_params={"dims": task.attention_hidden},
        )
        # Its default also has a weight decay, which is left out everywhere here.
        self._trainer = CTRTrainer(model, optimizer_params={"lr": 1e-3})
        ready = [
            ({k: torch.from_numpy(v) for k, v in _columns(b).items()}, torch.from_numpy(b.label))
            for b in rows.batches()
        ]
        self._ready = cycle(ready)
        few = rows.part(0, 1)
        loader, _, _ = DataGenerator(_columns(rows), rows.label).generate_dataloader(
            _columns(few), few.label, _columns(few), few.label, batch_size=rows.batch_size, num_workers=0
        )
        self._loaded = _endless(loader)

    def bare(self, steps: int) -> float:
        return float(self._trainer.train_one_epoch(islice(self._ready, steps)))

    def full(self, steps: int) -> float:
        return float(self._trainer.train_one_epoch(islice(self._loaded, steps)))


def _columns(rows: Rows) -> dict[str, np.ndarray]:
    return {"user": rows.user, "item": rows.item, "history": rows.history}


def _as_tensors(batch: Rows) -> Loaded:
    columns = {name: torch.from_numpy(column) for name, column in _columns(batch).items()}
    return columns, torch.from_numpy(batch.label)


def _endless(loader: Any) -> Iterator[Loaded]:
    while True:
        yield from loader


if __name__ == "__main__":
    serve(_TorchRechub, packages=("torch-rechub", "torch", "numpy"))
