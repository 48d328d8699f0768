"""Brings the pluggable parts in: the built-in ones, a user's modules, and instances by name and options."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import Registry, closest

__all__ = ["build_part", "load_builtin_parts", "load_plugins"]

_BUILTIN = (
    "alignment.contrast",
    "encoders.image",
    "encoders.text",
    "histories.cache",
    "histories.lora_qformer",
    "histories.shared",
    "rankers.dcn_v2",
    "rankers.deepfm",
    "rankers.din",
    "rankers.dlrm",
    "rankers.mmoe",
    "towers.concat",
    "towers.frozen_pool",
    "towers.qformer",
)


def load_builtin_parts() -> None:
    """Register the parts that come with this package."""
    for name in _BUILTIN:
        importlib.import_module(f"torchrec_em3.components.{name}")


def load_plugins(plugins: str) -> None:
    """Import the modules in which a user registers parts; their names come with commas between them.

    Raises:
        ConfigError: If a module cannot be found; an error inside the user's module is the user's to see, and passes
            through.
    """
    for module in filter(None, plugins.split(",")):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise
            raise ConfigError(
                f"--plugins {module}: no module '{error.name}' on the Python path; "
                "install the package or set PYTHONPATH"
            ) from error


def build_part(registry: Registry, name: str, options: Mapping[str, Any], *args: Any) -> Any:
    """Return an instance of the registered part `name`: `class(options, *args)`.

    Raises:
        ConfigError: If the name or one of the options is unknown, with the nearest known one.
    """
    part = registry.get(name)
    known = [field.name for field in dataclasses.fields(part.options)]
    for key in options:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"{registry.kind} '{name}' has no option '{key}'; options: {listed}.{closest(key, known)}"
            )
    return part.build(part.options(**options), *args)
