"""What a run writes while it goes: console lines, metrics.jsonl, what its sinks show, records of versions."""

import importlib.metadata
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchrec_em3
from torchrec_em3.config import Config
from torchrec_em3.sinks import Sink, check_sinks, open_sinks

__all__ = ["RunLog", "configure_logging", "versions", "write_json"]

logger = logging.getLogger(__name__)
_PACKAGES = (
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "torchdata",
    "transformers",
    "peft",
    "numpy",
    "pyarrow",
)


def configure_logging(first_rank: bool) -> None:
    """Send this project's log lines to standard error: all of them on rank 0, warnings on the others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    project = logging.getLogger("torchrec_em3")
    project.handlers[:] = [handler]
    project.propagate = False
    project.setLevel(logging.INFO if first_rank else logging.WARNING)
    # What torch and torchdata say about their own insides at every start helps nobody who trains a ranker.
    warnings.filterwarnings("ignore", module="torchdata|torchrec|torch")
    for noisy in ("torch.fx._symbolic_trace", "torchrec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries that decide results."""
    found = {"torchrec_em3": torchrec_em3.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class RunLog:
    """Scalars of a run, to metrics.jsonl and the sinks of its config; does nothing on other ranks than the first."""

    def __init__(self, run: Path, config: Config, first_rank: bool) -> None:
        """Open the run folder's logs for appending.

        Raises:
            ConfigError: If the package of a sink is not installed.
        """
        check_sinks(config.train.sinks)
        self._open = first_rank
        self._path = run / "metrics.jsonl"
        self._sinks: list[Sink] = []
        if first_rank:
            self._lines = self._path.open("a", encoding="utf-8")
            self._sinks = open_sinks(run, config)

    def scalars(self, phase: str, *, step: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Record numbers of one step; None (undefined) is recorded as null and left out of the sinks."""
        if not self._open:
            return
        self._lines.write(json.dumps({"step": step, "epoch": epoch, "phase": phase, **values}) + "\n")
        self._lines.flush()
        defined = {f"{phase}/{name}": value for name, value in values.items() if value is not None}
        for sink in self._sinks:
            sink.scalars(defined, step)

    def rewind(self, step: int, epochs: int | None = None) -> None:
        """Forget the lines that a resumed run writes again.

        Args:
            step: Lines of later steps are forgotten.
            epochs: So are those of epochs from this number on, if it is given.
        """
        if not self._open:
            return
        self._lines.close()
        lines = self._path.read_text(encoding="utf-8").splitlines()
        found = [(line, json.loads(line)) for line in lines if line.endswith("}")]
        kept = [
            line for line, values in found if values["step"] <= step and (epochs is None or values["epoch"] < epochs)
        ]
        self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._lines = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flush and close the files and the sinks."""
        if self._open:
            self._open = False
            self._lines.close()
            for sink in self._sinks:
                sink.close()
