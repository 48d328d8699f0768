"""The metadata of a checkpoint, which torch.distributed.checkpoint pickles, read without trusting it.

A pickle may name any function and have it called. The reader here looks up only the classes that the metadata of our
own checkpoints is made of, and refuses all else. No class for pickled values is among them, so that torch, which would
unpickle those, finds none.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from torchrec_em3.checkpoint_manifest import METADATA_FILE, read_manifest
from torchrec_em3.errors import CheckpointError

__all__ = ["MetadataReader", "check_column_shards", "check_metadata", "read_metadata", "saved_names"]

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
    }
)
"""What the metadata of a checkpoint names, besides the types of tensors (a test compares it with a real one)."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look up a class or function, if it is one that metadata needs."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in ALLOWED:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint of ours holds")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a checkpoint whose manifest has been verified.

    Raises:
        CheckpointError: If it holds anything but what our checkpoints hold; nothing of it has been executed.
    """
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # a malformed pickle may raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is refused: it holds a {type(metadata).__name__} in place of metadata")
    return metadata


def saved_names(folder: Path) -> set[str]:
    """Return the names of what a checkpoint holds."""
    return set(read_metadata(folder).state_dict_metadata)


def check_metadata(folder: Path) -> None:
    """Check that the metadata can be read and refers only to files that the manifest vouches for.

    Raises:
        CheckpointError: If not.
    """
    listed = read_manifest(folder)
    for place in (read_metadata(folder).storage_data or {}).values():
        if place.relative_path not in listed:
            raise CheckpointError(f"{folder / METADATA_FILE} refers to {place.relative_path}, not in the manifest")


def check_column_shards(folder: Path, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the optimizers keep as many numbers a row as the checkpoint does.

    Row-wise Adagrad keeps one for each column shard of a table: the mean of other columns' squared gradients each.

    Args:
        folder: A checkpoint whose manifest has been verified.
        state: State of the optimizers that it is to be loaded into, by parameter.

    Raises:
        CheckpointError: If a table has another number of column shards than when it was saved.
    """
    saved = read_metadata(folder).state_dict_metadata
    for name, values in state.items():
        table = saved.get(f"model.{name.removeprefix('tables.')}")
        for key, value in values.items():
            entry = saved.get(f"optimizer.state.{name}.{key}")
            if not isinstance(table, TensorStorageMetadata) or not isinstance(entry, TensorStorageMetadata):
                continue
            if not isinstance(value, ShardedTensor) or len(value.size()) != 1:
                continue
            now, then = (size[0] // table.size[0] for size in (value.size(), entry.size))
            if now != then and value.size()[0] == now * table.size[0]:
                raise CheckpointError(
                    f"checkpoint {folder} has an optimizer state for each of {then} column shards of "
                    f"{key.split('.')[0]}, this plan needs {now}; shard the table column-wise if it was and not "
                    "otherwise, or train with --embeddings.optimizer adagrad, whose state any plan can read"
                )


class MetadataReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the metadata read as above."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata; torch calls this, on each rank."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
