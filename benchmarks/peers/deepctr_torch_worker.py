"""DeepCTR-Torch: its DIN; runs in DeepCTR-Torch's environment.

`full` calls `fit`, which has no step of its own to call; `bare` does what a step of `fit` does, to a batch that is a
float tensor already, as `fit` makes it.
"""

from itertools import islice

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DIN
from protocol import Task, cycle, serve
from rows import Rows
from torch import Tensor


class _DeepCtr:
    def __init__(self, rows: Rows, task: Task) -> None:
        user = SparseFeat("user", rows.num_users + 1, embedding_dim=task.embedding_dim)
        item = SparseFeat("item", rows.num_items + 1, embedding_dim=task.embedding_dim)
        history = SparseFeat("hist_item", rows.num_items + 1, embedding_dim=task.embedding_dim, embedding_name="item")
        self._model = DIN(
            [user, item, VarLenSparseFeat(history, maxlen=rows.history.shape[1], length_name="length")],
            ["item"],
            dnn_hidden_units=task.hidden,
            att_hidden_size=task.attention_hidden,
            l2_reg_embedding=0.0,  # its default, 1e-6, passes every row of every table through the loss at every step
        )
        self._model.compile("adam", "binary_crossentropy")
        self._batch_size = rows.batch_size
        self._parts = cycle(list(rows.batches()))
        self._ready = cycle([self._as_tensors(batch) for batch in rows.batches()])

    def bare(self, steps: int) -> float:
        model = self._model.train()
        loss = torch.zeros(())
        for inputs, label in islice(self._ready, steps):
            prediction = model(inputs).squeeze(-1)
            model.optim.zero_grad()
            loss = model.loss_func(prediction, label, reduction="sum")
            total = loss + model.get_regularization_loss() + model.aux_loss
            total.backward()
            model.optim.step()
        return loss.item()

    def full(self, steps: int) -> float:
        parts = list(islice(self._parts, steps))
        by_part = [_columns(part) for part in parts]
        columns = {name: np.concatenate([columns[name] for columns in by_part]) for name in by_part[0]}
        label = np.concatenate([part.label for part in parts])
        history = self._model.fit(columns, label, batch_size=self._batch_size, epochs=1, verbose=0)
        return float(history.history["loss"][-1])

    def _as_tensors(self, batch: Rows) -> tuple[Tensor, Tensor]:
        columns = _columns(batch)
        inputs = [columns[name].reshape(len(batch.user), -1) for name in self._model.feature_index]
        return torch.from_numpy(np.concatenate(inputs, axis=1)).float(), torch.from_numpy(batch.label)


def _columns(rows: Rows) -> dict[str, np.ndarray]:
    return {"user": rows.user, "item": rows.item, "hist_item": rows.history, "length": rows.length}


if __name__ == "__main__":
    serve(_DeepCtr, packages=("deepctr-torch", "torch", "numpy"))
