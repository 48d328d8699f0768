"""The package that `em3 export` writes: which files it has, and how they are checked before anything reads them.

| file | holds |
|---|---|
| config.json | format, version, precision, features, limits, origin and measured parity |
| dense.pt2 | the dense graph (torch.export) |
| tables.safetensors | packed rows of the ID tables, of the content bank and of codes, and which items have them |
| items.parquet | raw_id; row i is item row i + 1 |
| users.parquet | raw_id and the row of each side feature; row i is user i + 1 |
| vocab/FEATURE.parquet | value of each row of a side feature, or of a sparse feature of requests |
| manifest.json | size and SHA-256 of each of these |

Of a table of raw ids the rows that users or items have are written, each once; `user_rows` or `item_rows` in
tables.safetensors says which of them each user or item row has (int32).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchrec_em3.errors import CheckpointError
from torchrec_em3.schema import DenseFeature
from torchrec_em3.serving.rows import Precision

__all__ = [
    "CONFIG_FILE",
    "GRAPH_FILE",
    "ITEMS_FILE",
    "TABLES_FILE",
    "USERS_FILE",
    "PackageConfig",
    "check_package",
    "read_config",
    "vocabulary_file",
    "write_manifest",
]

FORMAT_VERSION = 5
READ_VERSIONS = (1, 2, 3, 4, FORMAT_VERSION)
"""In version 1 nothing was known of codes and of several tasks, in version 2 nothing of tables of raw ids, in version 3
nothing of features of requests, in version 4 nothing of widths."""
CONFIG_FILE, MANIFEST_FILE = "config.json", "manifest.json"
GRAPH_FILE, TABLES_FILE = "dense.pt2", "tables.safetensors"
ITEMS_FILE, USERS_FILE = "items.parquet", "users.parquet"
AGAIN = "export the run again"


@dataclass(frozen=True, kw_only=True)
class PackageConfig:
    """What config.json says.

    Attributes:
        version: Name of this package: step, precision and the start of the hash of its tensors and graph.
        precision: How tables and content are stored.
        width: D, width of embeddings.
        widths: Numbers in a row of each table. A packed row may hold more, which are cut off; that of a table which is
            not named does not.
        max_history: Most recent events that a score depends on.
        user_features: "user" and the side features, in the order of the graph's first input.
        sparse: Sparse features of a request, which follow there.
        known_users: Users with training rows; they are users 1 to this number. Where there are no `user_rows`, they
            have an embedding of their own each, and the others that of "unknown".
        known_items: The same of items and `item_rows`.
        content: Whether the graph takes content of the candidates.
        content_history: Whether it takes content of the history.
        codes: Whether it takes vectors of codes, of the candidates and of the history.
        tasks: Names of the labels, the main one first; several mean a logit of each for a candidate.
        dense: Dense features of a request, in the order of the graph's input.
        origin: Checkpoint and data it was made of.
        parity: How its logits compare with the trained model's.
        format_version: Version of this layout.
    """

    version: str
    precision: Precision
    width: int
    max_history: int
    user_features: tuple[str, ...]
    known_users: int
    known_items: int
    content: bool
    content_history: bool
    origin: Mapping[str, str]
    codes: bool = False
    tasks: tuple[str, ...] = ("label",)
    sparse: tuple[str, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def given_features(self) -> tuple[str, ...]:
        """Names of the categorical features that a request may give: the user's side features and its own."""
        return self.user_features[1:] + self.sparse

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, ready for JSON."""
        return asdict(self)


def vocabulary_file(feature: str) -> str:
    """Return where the values of a side feature are."""
    return f"vocab/{feature}.parquet"


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of every file of a package."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def check_package(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: If this is no package, or of another format, or a file is missing or has changed.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no package: it has no {MANIFEST_FILE}; make one with em3 export")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        files = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); {AGAIN}") from error
    if version not in READ_VERSIONS:
        known = ", ".join(map(str, READ_VERSIONS))
        raise CheckpointError(f"{path} has format version {version}, this program reads {known}; {AGAIN}")
    for name in {CONFIG_FILE, GRAPH_FILE, TABLES_FILE, ITEMS_FILE, USERS_FILE} - files.keys():
        raise CheckpointError(f"{path} does not list {name}; {AGAIN}")
    for name, (size, sha256) in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {AGAIN}")
        if (file.stat().st_size, _sha256(file)) != (size, sha256):
            raise CheckpointError(f"{file} does not match its size and SHA-256 in {MANIFEST_FILE}; {AGAIN}")


def read_config(folder: Path) -> PackageConfig:
    """Read config.json.

    Raises:
        CheckpointError: If it is not the config of a package.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = ("user_features", "sparse", "tasks")
        lists = {name: tuple(values[name]) for name in names if name in values}
        dense = tuple(DenseFeature(**feature) for feature in values.get("dense", ()))
        return PackageConfig(**{**values, **lists, "dense": dense})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of a package ({error}); {AGAIN}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
