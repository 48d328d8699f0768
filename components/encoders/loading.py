"""Frozen pretrained weights: from installed packages with a checked hash, or from Hugging Face folders and names."""

import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrec_em3.errors import ConfigError

__all__ = ["check_weights", "load_pretrained", "package_module", "quiet_transformers"]


def package_module(package: str, module: str) -> Any:
    """Return the imported module of a package that carries weights.

    Args:
        package: Name and version as pip writes it.
        module: Import name.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"the encoder needs the package {package} ({error}); run: pip install {package}") from error


def check_weights(path: Path, sha256: str) -> str:
    """Return a short revision of the weights in `path`.

    Args:
        path: File with the weights.
        sha256: Expected hash, hex digits.

    Raises:
        ConfigError: If the file is missing or is not the one that was reviewed.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path} are missing; reinstall the package that holds them")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ConfigError(
            f"weights {path} have sha256 {found[:16]}..., expected {sha256[:16]}...; reinstall the package"
        )
    return f"sha256:{sha256[:16]}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading reports and bars of transformers (weights we do not use are expected), then restore them."""
    from transformers.utils import logging as transformers_logging

    settings: Any = transformers_logging
    verbosity, had_bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if had_bars:
            settings.enable_progress_bar()


def load_pretrained(loader: Any, encoder: str, model: str, **options: Any) -> Any:
    """Call `loader.from_pretrained(model, ...)` quietly; code that comes with a model is never run.

    Args:
        loader: AutoTokenizer, AutoImageProcessor or AutoModel.
        encoder: Registered name of the encoder, for the message.
        model: Hub name or local folder.
        **options: Passed on, such as `revision`.

    Raises:
        ConfigError: If the model is neither in a local folder, nor in the cache, nor to be had from the hub.
    """
    is_folder = Path(model).is_dir()
    if not is_folder and (model.startswith((".", "/", "~")) or not model):
        raise ConfigError(
            f"option model of encoder '{encoder}': no folder {model!r}; give a local folder or a hub name"
        )
    if is_folder:
        options = {key: value for key, value in options.items() if key != "revision"} | {"local_files_only": True}
    try:
        with quiet_transformers():
            return loader.from_pretrained(model, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        advice = "unset HF_HUB_OFFLINE to fetch it from the hub" if offline else "check the name and the network"
        raise ConfigError(
            f"option model of encoder '{encoder}': cannot load {model!r} ({reason}); "
            f"give a local folder with the model, or {advice}"
        ) from error
