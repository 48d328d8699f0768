"""FuxiCTR: DIN of its own layers, trained by its own step; runs in FuxiCTR's environment.

The wheel holds the layers and the training, but of the models only LongCTR and the multitask ones, so the few lines
that join its embedding, its DIN attention and its MLP are here.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbeddingDict, MLP_Block
from fuxictr.pytorch.models import BaseModel
from protocol import Task, cycle, serve
from rows import Rows
from torch import Tensor


class _Din(BaseModel):
    """User, target and attended history through the DNN, as in FuxiCTR's DIN."""

    def __init__(self, feature_map: FeatureMap, task: Task) -> None:
        super().__init__(feature_map, model_id="DIN", model_root=task.folder, metrics=["AUC"], verbose=0)
        self.embedding_layer = FeatureEmbeddingDict(feature_map, task.embedding_dim)
        self.attention = DIN_Attention(
            task.embedding_dim, task.attention_hidden, hidden_activations=task.options["attention_activation"]
        )
        self.dnn = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim(),
            hidden_units=task.hidden,
            output_dim=1,
            output_activation=self.output_activation,
        )
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.get_inputs(inputs)
        embeddings = self.embedding_layer(features)
        known = features["history"].long() != 0
        embeddings["history"] = self.attention(embeddings["item"], embeddings["history"], known)
        return {"y_pred": self.dnn(self.embedding_layer.dict2tensor(embeddings, flatten_emb=True))}


class _FuxiCtr:
    def __init__(self, rows: Rows, task: Task) -> None:
        feature_map = _feature_map(rows, task)
        self._model = _Din(feature_map, task)
        self._model._max_gradient_norm = 10.0  # what `fit` sets by default
        self._model.train()
        self._ready = cycle([_ready(batch) for batch in rows.batches()])
        # Its loader reads the file of the rows as it is.
        loader = NpzDataLoader(feature_map, sys.argv[1], batch_size=rows.batch_size, shuffle=True, num_workers=0)
        self._loaded = _endless(loader)

    def bare(self, steps: int) -> float:
        return self._train(self._ready, steps)

    def full(self, steps: int) -> float:
        return self._train(self._loaded, steps)

    def _train(self, batches: Iterator[dict[str, Tensor]], steps: int) -> float:
        loss = 0.0
        for batch in islice(batches, steps):
            loss = self._model.train_step(batch).item()
        return loss


def _feature_map(rows: Rows, task: Task) -> FeatureMap:
    feature_map = FeatureMap("rows", task.folder)
    item = {"source": "item", "vocab_size": rows.num_items + 1, "padding_idx": 0}
    feature_map.features = OrderedDict(
        user={"type": "categorical", "source": "user", "vocab_size": rows.num_users + 1, "padding_idx": 0},
        item={"type": "categorical", **item},
        history={"type": "sequence", "max_len": rows.history.shape[1], "share_embedding": "item", **item},
    )
    feature_map.labels = ["label"]
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.default_emb_dim = task.embedding_dim
    feature_map.set_column_index()
    return feature_map


def _ready(batch: Rows) -> dict[str, Tensor]:
    return {name: torch.from_numpy(getattr(batch, name)) for name in ("user", "item", "history", "label")}


def _endless(loader: Any) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


if __name__ == "__main__":
    serve(_FuxiCtr, packages=("fuxictr", "torch", "numpy"))
