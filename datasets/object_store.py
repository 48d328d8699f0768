"""Object stores by their fsspec URL, with errors of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from torchrec_em3.errors import ConfigError, DataError, EM3Error

__all__ = ["open_store", "store_errors"]


def open_store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path of the folder in it.

    Raises:
        ConfigError: If nothing that is installed can read such a URL.
    """
    try:
        files, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url}: {_first_line(error)}; install the package that fsspec names for it, or use a path"
        ) from error
    return files, root.rstrip("/")


@contextmanager
def store_errors(url: str, kind: type[EM3Error] = DataError) -> Iterator[None]:
    """Within, whatever an object store's library raises becomes one line that names the URL.

    Args:
        url: Where it is.
        kind: What to raise.
    """
    try:
        yield
    except EM3Error:
        raise
    except Exception as error:  # each of these libraries has errors of its own
        raise kind(f"{url}: {type(error).__name__}: {_first_line(error)}; check address and credentials") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
