"""MMCTR-Bench: its DIN or its EM3 on its own loader, trained by its engine; runs in an environment of its own.

Read from a checkout of the repository (`--mmctr_repo`), whose `src` is on the path. It has one table for users and
items, so item ids begin behind those of the users.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmctr.data.datasets.arrays import save_manifest
from mmctr.data.datasets.microlens import MicroLensLoader
from mmctr.data.manifest import DatasetManifest
from mmctr.models.common.registry import create_model
from mmctr.training import CheckpointManager, TrainingEngine, build_optimizer
from protocol import Task, cycle, serve
from rows import Rows

CONTENT = {"text": 384, "image": 512}
"""Widths of the stored features of its EM3."""
READY_BATCHES = 2
"""A ready batch holds the content of every history position: 0.7 GiB at 4,096 rows of 50."""


class _Mmctr:
    def __init__(self, rows: Rows, task: Task) -> None:
        name = task.options["model"]
        content = CONTENT if name == "em3" else {}
        data = Path(task.folder) / "data"
        _write(rows, data, content)
        loader = MicroLensLoader({"data_dir": str(data)}, rows.batch_size)
        torch.manual_seed(0)
        model = create_model(name, _model_config(task), _data_config(rows, content))
        optimizer = build_optimizer(model, "adam", 1e-3)
        checkpoints = CheckpointManager(Path(task.folder) / "checkpoints")
        self._engine = TrainingEngine(model, optimizer, torch.device("cpu"), checkpoints)
        self._ready = cycle(list(islice(loader.iter_batches("train"), READY_BATCHES)))
        self._loaded = _endless(loader)

    def bare(self, steps: int) -> float:
        return float(self._engine.train_epoch(islice(self._ready, steps), 0).loss)

    def full(self, steps: int) -> float:
        return float(self._engine.train_epoch(islice(self._loaded, steps), 0).loss)


def _model_config(task: Task) -> dict[str, Any]:
    """Return the options of its catalogue with the widths of the others."""
    return {
        "latent_dim": task.embedding_dim,
        "projection_dim": task.embedding_dim,
        "mlp_dims": task.hidden,
        "attention_mlp_dims": task.attention_hidden,
        "dropout": 0.0,
        "batch_norm": True,
    }


def _data_config(rows: Rows, content: dict[str, int]) -> dict[str, Any]:
    return {
        "id_feature_num": rows.num_users + rows.num_items,
        "use_mm_features": ["id", *content],
        "mm_seq_dims": content,
        "user_features": ["id"],
        "user_features_dim": {},
    }


def _write(rows: Rows, folder: Path, content: dict[str, int]) -> None:
    """Write its format `named-npy-v1`: an item store, the training split and a manifest."""
    store, split = folder / "item_features", folder / "splits" / "train"
    store.mkdir(parents=True)
    split.mkdir(parents=True)
    items = rows.num_users + np.arange(1, rows.num_items + 1)
    np.save(store / "item_ids.npy", np.concatenate([[0], items]))
    random = np.random.default_rng(0)
    for name, dim in content.items():
        np.save(store / f"{name}.npy", random.standard_normal((rows.num_items + 1, dim), dtype=np.float32))
    np.save(split / "user_ids.npy", rows.user)
    np.save(split / "item_ids.npy", rows.num_users + rows.item)
    np.save(split / "history_item_ids.npy", np.where(rows.history > 0, rows.num_users + rows.history, 0))
    np.save(split / "labels.npy", rows.label)
    manifest = DatasetManifest(
        name=MicroLensLoader.dataset_name,
        version="rows",
        storage_format="named-npy-v1",
        sequence_length=rows.history.shape[1],
        padding_id=0,
        feature_dimensions={"id": 1, **content},
    )
    save_manifest(manifest, folder / "manifest.json")


def _endless(loader: MicroLensLoader) -> Iterator[Any]:
    while True:
        yield from loader.iter_batches("train")


if __name__ == "__main__":
    serve(_Mmctr, packages=("torch", "numpy"))
