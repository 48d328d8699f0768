"""Item embeddings of a run: computed for the catalogue or for new items, written, and read again.

Shape letters: N items, U items of a batch, D width.
"""

import importlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from torchrec_em3.content_path import ITEMS_AT_A_TIME, ContentPath
from torchrec_em3.datasets.raw import RawItems
from torchrec_em3.errors import ConfigError, DataError, NumericError
from torchrec_em3.item_tokens import TokenSource
from torchrec_em3.process_group import Ranks
from torchrec_em3.trained_run import TrainedRun

__all__ = ["ItemEmbeddings", "embed_catalogue", "embed_new_items", "import_faiss"]

TABLE_FILE, VECTOR_FILE, INDEX_FILE = "items.parquet", "items.safetensors", "items.faiss"
ORIGIN, AGAIN = "origin", "run em3 embed again"


@dataclass(frozen=True)
class ItemEmbeddings:
    """Embeddings of items, aligned columns, in catalogue order.

    Attributes:
        raw_id: Publisher's ids.
        title: Titles or "".
        known_N: Items with an ID embedding of their own; the `id` of the others is that of "unknown".
        present_N: Items with a text or a picture; the `content` of the others is the tower's output for nothing.
        vectors: float32 [N, D] by name. `id`: from the item table. `content`: after the projection, as the ranker sees
            it. `tower`: before the projection, as the content bank holds it. New items have no `id`, and a run without
            content tower has nothing else.
        origin: Checkpoint and data that they come from (see `trained_run.describe_origin`).
    """

    raw_id: list[str]
    title: list[str]
    known_N: NDArray[np.bool_]
    present_N: NDArray[np.bool_]
    vectors: Mapping[str, NDArray[np.float32]]
    origin: Mapping[str, str]

    def valid(self, space: str) -> NDArray[np.bool_]:
        """Return which items have a vector of their own in the space "content" or "id"."""
        return self.known_N if space == "id" else self.present_N

    def write(self, folder: Path, *, faiss: bool = False) -> list[Path]:
        """Write the table, the tensors and, if asked for, the index; each file as a whole or not at all.

        Args:
            folder: Made if need be; embeddings of before are replaced.
            faiss: Whether to write the index over `content`, too.

        Returns:
            The files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        table, tensors = folder / TABLE_FILE, folder / VECTOR_FILE
        pq.write_table(self._table(), _temporary(table), compression="zstd", write_page_checksum=True)
        masks = {"known": self.known_N, "present": self.present_N}
        save_file({**self.vectors, **masks}, _temporary(tensors), metadata=self._metadata())
        # safetensors makes a file that its owner alone may read.
        shutil.copymode(_temporary(table), _temporary(tensors))
        files = [table, tensors]
        if faiss:
            files.append(folder / INDEX_FILE)
            _write_index(_temporary(files[-1]), self.vectors["content"], self.present_N)
        for file in files:
            os.replace(_temporary(file), file)
        return files

    @classmethod
    def read(cls, folder: Path, origin: Mapping[str, str]) -> "ItemEmbeddings | None":
        """Read what `write` wrote, or return None if nothing is there or it is of another origin.

        Raises:
            DataError: If a file is damaged.
        """
        if not (folder / TABLE_FILE).is_file() or not (folder / VECTOR_FILE).is_file():
            return None
        try:
            table = pq.read_table(folder / TABLE_FILE, columns=["raw_id", "title"], page_checksum_verification=True)
            with safe_open(folder / VECTOR_FILE, framework="numpy") as file:
                found = json.loads(file.metadata()[ORIGIN])
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            known_N, present_N = vectors.pop("known"), vectors.pop("present")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError) as error:
            raise DataError(f"{folder}: damaged ({str(error).splitlines()[0]}); {AGAIN}") from error
        if table.num_rows != len(known_N):
            raise DataError(f"{folder}: {table.num_rows} items in the table, {len(known_N)} in the tensors; {AGAIN}")
        if found != origin:
            return None
        return cls(table["raw_id"].to_pylist(), table["title"].to_pylist(), known_N, present_N, vectors, found)

    def _table(self) -> pa.Table:
        """Return one row an item; vectors that are not the item's own are null."""
        columns: dict[str, Any] = {
            "raw_id": pa.array(self.raw_id, pa.string()),
            "title": pa.array(self.title, pa.string()),
            "known": self.known_N,
            "present": self.present_N,
        }
        for space in ("content", "id"):
            if space in self.vectors:
                columns[space] = _vector_column(self.vectors[space], self.valid(space))
        return pa.table(columns).replace_schema_metadata(self._metadata())

    def _metadata(self) -> dict[str, str]:
        """Return the origin under one key, because safetensors writes several in any order."""
        return {ORIGIN: json.dumps(self.origin, sort_keys=True)}


@torch.no_grad()
def embed_catalogue(trained: TrainedRun, ranks: Ranks) -> ItemEmbeddings | None:
    """Embed the whole catalogue, items never trained on included, each rank its share. Collective.

    Returns:
        The embeddings on rank 0, None on the others.

    Raises:
        NumericError: If an embedding is not finite.
    """
    model, catalogue = trained.sharded.model, trained.data.items
    rows, parts = model.item_rows, []
    stride = ITEMS_AT_A_TIME * ranks.world_size
    with tqdm(total=rows - 1, desc="embed", unit="item", disable=None if ranks.is_first else True) as bar:
        for start in range(1, rows, stride):
            first = start + ranks.rank * ITEMS_AT_A_TIME
            items_U = torch.arange(min(first, rows), min(first + ITEMS_AT_A_TIME, rows), device=ranks.device)
            found = model.items(items_U, items_U[:0])
            part = {"id": found.target_UD, "known": found.known_U}
            if model.content is not None:
                part |= _encode(model.content, items_U)
            parts.append(_to_numpy(part))
            bar.update(min(stride, rows - start))
    gathered = ranks.gather(parts)
    if gathered is None:
        return None
    in_order = [part for step in zip(*gathered, strict=True) for part in step]
    raw_id, title = (catalogue[name].to_pylist()[1:] for name in ("raw_id", "title"))
    return _assemble(raw_id, title, in_order, trained.origin)


@torch.no_grad()
def embed_new_items(trained: TrainedRun, items: RawItems, store: TokenSource) -> ItemEmbeddings:
    """Embed items that the run's data does not hold, by their content alone. Not collective.

    Args:
        trained: The run; nothing of it changes.
        items: The new items.
        store: Their tokens; item i is row i + 1, as in a catalogue (see `torchrec_em3.datasets.new_items`).

    Raises:
        ConfigError: If the run has no content tower.
        NumericError: If an embedding is not finite.
    """
    content = trained.sharded.model.content
    if content is None:
        raise ConfigError("the run has --model.content none, so its model cannot tell new items apart")
    device, parts, count = content.projection.weight.device, [], len(items.item_id)
    with tqdm(total=count, desc="embed", unit="item", disable=None) as bar:
        for start in range(0, count, ITEMS_AT_A_TIME):
            rows_U = torch.arange(start, min(start + ITEMS_AT_A_TIME, count), device=device) + 1
            part = {"known": torch.zeros(len(rows_U), dtype=torch.bool), **_encode(content, rows_U, store)}
            parts.append(_to_numpy(part))
            bar.update(len(rows_U))
    return _assemble(items.item_id.tolist(), items.title.tolist(), parts, trained.origin)


def import_faiss() -> Any:
    """Return the module faiss.

    Raises:
        ConfigError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ConfigError(f"--faiss needs faiss-cpu ({error}); run: pip install torchrec-em3[faiss]") from error


def _encode(content: ContentPath, rows_U: Tensor, store: TokenSource | None = None) -> dict[str, Tensor]:
    tower_UD, present_U = content.encode(rows_U, store)
    return {"tower": tower_UD, "content": content.projection(tower_UD), "present": present_U}


def _to_numpy(part: Mapping[str, Tensor]) -> dict[str, NDArray]:
    return {name: (value.float() if value.is_floating_point() else value).cpu().numpy() for name, value in part.items()}


def _assemble(
    raw_id: list[str], title: list[str], parts: list[dict[str, NDArray]], origin: Mapping[str, str]
) -> ItemEmbeddings:
    """Join the parts, and refuse what is not finite."""
    vectors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    known_N = vectors.pop("known")
    present_N = vectors.pop("present", np.zeros(len(known_N), dtype=bool))
    for name, vectors_ND in vectors.items():
        bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        if bad.size:
            raise NumericError(f"{name} embedding of item '{raw_id[bad[0]]}' is not finite; the model has diverged")
    return ItemEmbeddings(raw_id, title, known_N, present_N, vectors, origin)


def _vector_column(vectors_ND: NDArray[np.float32], valid_N: NDArray[np.bool_]) -> pa.Array:
    values = pa.array(np.ascontiguousarray(vectors_ND).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors_ND.shape[1], mask=pa.array(~valid_N))


def _write_index(path: Path, content_ND: NDArray[np.float32], present_N: NDArray[np.bool_]) -> None:
    """Write an exact inner-product index over unit vectors; items without content are zero, so near to nothing."""
    faiss = import_faiss()
    unit_ND = np.where(present_N[:, None], content_ND, 0.0).astype(np.float32)
    faiss.normalize_L2(unit_ND)
    index = faiss.IndexFlatIP(unit_ND.shape[1])
    index.add(unit_ND)
    faiss.write_index(index, str(path))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
