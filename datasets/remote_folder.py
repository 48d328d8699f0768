"""Prepared folders in object stores, by their fsspec URL: written whole, read from a copy on this machine."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torchrec_em3.datasets.object_store import open_store, store_errors
from torchrec_em3.datasets.prepared import hash_content
from torchrec_em3.errors import DataError

__all__ = ["is_url", "local_folder", "uploaded_folder"]

logger = logging.getLogger(__name__)
META_FILE = "meta.json"
"""Written last and removed first: what has none is not a prepared folder."""


def is_url(place: str) -> bool:
    """Return whether a place is a URL such as s3://bucket/data, and not a path."""
    return "://" in place


def local_folder(place: str) -> Path:
    """Return a prepared folder as a path; that of a URL is a copy on this machine, fetched when it is first asked for.

    Tokens, histories and tables are mapped into memory, which no object store can do, so all of a folder is fetched. A
    copy is kept under the hash of its `meta.json`, which holds that of the data: when the folder at the URL is prepared
    anew, it is fetched anew. Copies lie in `$EM3_CACHE`, by default ~/.cache/torchrec-em3; processes of one machine
    wait for the first of them to fetch.

    Args:
        place: Path or fsspec URL of a folder that `em3 prepare` wrote.

    Raises:
        ConfigError: If nothing that is installed can read such a URL.
        DataError: If there is no prepared folder, it cannot be read, or what was fetched is not what was written.
    """
    if not is_url(place):
        return Path(place)
    files, root = open_store(place)
    with store_errors(place):
        try:
            meta = files.cat_file(f"{root}/{META_FILE}")
        except FileNotFoundError as error:
            raise DataError(f"{place}: no {META_FILE}, so not a prepared folder; make one with em3 prepare") from error
    cache = Path(os.environ.get("EM3_CACHE") or Path.home() / ".cache" / "torchrec-em3") / "prepared"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / hashlib.sha256(meta).hexdigest()
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(files, root, place, folder)
    return folder


@contextmanager
def uploaded_folder(url: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write a prepared folder to, and put it to a URL at the end.

    Args:
        url: Where it goes.
        overwrite: Whether a prepared folder there may be replaced.

    Raises:
        ConfigError: If nothing that is installed can write to such a URL.
        DataError: If there is something at the URL that may not be replaced, or it cannot be written to.
    """
    files, root = open_store(url)
    with store_errors(url):
        names = files.find(root)
    prepared = f"{root}/{META_FILE}" in names
    if names and not (prepared and overwrite):
        what = "holds prepared data already" if prepared else "is not empty and not a prepared folder"
        raise DataError(f"{url}: {what}; give another URL{' or --overwrite' if prepared else ''}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        yield folder
        with store_errors(url):
            if prepared:
                files.rm_file(f"{root}/{META_FILE}")
                files.rm(root, recursive=True)
            paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            for path in sorted(paths, key=lambda path: path == META_FILE):
                files.makedirs(str(PurePosixPath(f"{root}/{path}").parent), exist_ok=True)
                files.put_file(str(folder / path), f"{root}/{path}")


def _fetch(files: Any, root: str, url: str, folder: Path) -> None:
    """Copy a folder to this machine and compare it with its hash; a copy that is interrupted never bears the name."""
    logger.info("fetching %s to %s", url, folder)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with store_errors(url):
        for name in files.find(root):
            path = PurePosixPath(name).relative_to(root)
            if ".." in path.parts:
                raise DataError(f"{url}: holds a file called {path}, which a prepared folder never does")
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(partial / path))
    wanted = json.loads((partial / META_FILE).read_text(encoding="utf-8")).get("content_hash")
    found = hash_content(partial)
    if found != wanted:
        shutil.rmtree(partial)
        raise DataError(
            f"{url}: contents hash to {found[:12]}, {META_FILE} says {str(wanted)[:12]}; it is being written or a file "
            "has changed: wait, or run em3 prepare again"
        )
    partial.rename(folder)
