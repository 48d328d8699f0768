"""The manifest of a checkpoint: size and SHA-256 of each of its files."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torchrec_em3.errors import CheckpointError
from torchrec_em3.runlog import write_json

__all__ = [
    "MANIFEST_FILE",
    "METADATA_FILE",
    "PROGRESS_FILE",
    "Digest",
    "OtherFormat",
    "digest",
    "read_manifest",
    "sync",
    "verify",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
METADATA_FILE = ".metadata"
PROGRESS_FILE = "progress.json"


class OtherFormat(CheckpointError):
    """A checkpoint that another version of this program has written: whole, but not to be read."""


class Digest(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str


def digest(path: Path) -> Digest:
    """Read a file and return its size and SHA-256."""
    with path.open("rb") as file:
        return Digest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def sync(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of files, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, digests: Mapping[str, Digest]) -> None:
    """Write the manifest, and see it and the folder to disk."""
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(digests.items())}
    write_json(folder / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": files})
    sync(folder / MANIFEST_FILE)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Digest]:
    """Return what the files of a checkpoint must be, by name.

    Raises:
        OtherFormat: If another version of this program has written the checkpoint.
        CheckpointError: If the manifest is missing or damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        files = {str(name): Digest(int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__})") from error
    if version != FORMAT_VERSION:
        raise OtherFormat(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; train again")
    for name in (METADATA_FILE, PROGRESS_FILE):
        if name not in files:
            raise CheckpointError(f"{path} does not list {name}")
    return files


def verify(folder: Path, names: Iterable[str]) -> None:
    """Compare files with the manifest.

    Args:
        folder: A checkpoint.
        names: Which files of the manifest.

    Raises:
        CheckpointError: If a file is missing or is not what the manifest says.
    """
    files = read_manifest(folder)
    for name in names:
        path = folder / name
        try:
            found = digest(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if found.size != files[name].size:
            raise CheckpointError(f"{path} has {found.size} bytes, {files[name].size} in {MANIFEST_FILE}")
        if found != files[name]:
            raise CheckpointError(f"{path} does not match its SHA-256 in {MANIFEST_FILE}")
