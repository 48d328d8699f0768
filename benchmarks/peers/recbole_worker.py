"""RecBole: its DIN on its columnar loader, trained by its Trainer; runs in RecBole's environment.

RecBole reads its own text format, in which the rows are written first. One option sets the widths of both the attention
and the DNN; the DNN is built anew here, of RecBole's own layer, so that both have the widths of the others.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Task, cycle, serve
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.model.layers import MLPLayers
from recbole.model.sequential_recommender import DIN
from recbole.trainer import Trainer
from rows import Rows
from torch import nn

NAME = "rows"


class _RecBole:
    def __init__(self, rows: Rows, task: Task) -> None:
        _write(rows, Path(task.folder) / NAME)
        config = _config(rows, task)
        dataset = create_dataset(config)
        train, _, _ = data_preparation(config, dataset)
        self._trainer = Trainer(config, _din(config, train.dataset, task))
        self._ready = cycle(list(train))
        self._loaded = _endless(train)

    def bare(self, steps: int) -> float:
        return self._train(self._ready, steps)

    def full(self, steps: int) -> float:
        return self._train(self._loaded, steps)

    def _train(self, batches: Iterator[Interaction], steps: int) -> float:
        return float(self._trainer._train_epoch(islice(batches, steps), 0)) / steps


def _din(config: Config, dataset: Any, task: Task) -> DIN:
    model = DIN(config, dataset)
    widths = [model.dnn_list[0], *task.hidden]
    model.dnn_mlp_layers = MLPLayers(widths, activation="Dice", dropout=model.dropout_prob, bn=True)
    model.dnn_predict_layers = nn.Linear(task.hidden[-1], 1)
    for module in (model.dnn_mlp_layers, model.dnn_predict_layers):
        module.apply(model._init_weights)
    return model


def _config(rows: Rows, task: Task) -> Config:
    options = {
        "data_path": task.folder,
        "checkpoint_dir": task.folder,
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LABEL_FIELD": "label",
        "load_col": {
            "inter": ["user_id", "item_id_list", "item_id", "label"],
            "user": ["user_id"],
            "item": ["item_id"],
        },
        "benchmark_filename": ["train", "few", "few"],
        "alias_of_item_id": ["item_id_list"],
        "MAX_ITEM_LIST_LENGTH": rows.history.shape[1],
        "train_neg_sample_args": None,
        "eval_args": {"mode": "labeled", "order": "TO"},
        "metrics": ["AUC"],
        "valid_metric": "AUC",
        "train_batch_size": rows.batch_size,
        "embedding_size": task.embedding_dim,
        "mlp_hidden_size": task.attention_hidden,
        "use_gpu": False,
    }
    return Config(model="DIN", dataset=NAME, config_dict=options)


def _write(rows: Rows, folder: Path) -> None:
    """Write RecBole's atomic files; those of users and items list them all, also the ones without a row."""
    folder.mkdir()
    for name, count in {"user": rows.num_users, "item": rows.num_items}.items():
        lines = np.char.add("\n", np.arange(1, count + 1).astype(str))
        (folder / f"{NAME}.{name}").write_text(f"{name}_id:token" + "".join(lines) + "\n")
    for name, part in {"train": rows, "few": rows.part(0, 1)}.items():
        with (folder / f"{NAME}.{name}.inter").open("w") as file:
            print("user_id:token", "item_id_list:token_seq", "item_id:token", "label:float", sep="\t", file=file)
            for user, history, length, item, label in zip(
                part.user, part.history, part.length, part.item, part.label, strict=True
            ):
                print(user, " ".join(map(str, history[:length])), item, label, sep="\t", file=file)


def _endless(loader: Any) -> Iterator[Interaction]:
    while True:
        yield from loader


if __name__ == "__main__":
    serve(_RecBole, packages=("recbole", "torch", "numpy"))
