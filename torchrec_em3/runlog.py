"""What a run writes while it goes: console lines, metrics.jsonl, TensorBoard events, records of versions."""

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

from torch.utils.tensorboard import SummaryWriter

import torchrec_em3

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
    """Scalars of a run, to metrics.jsonl and TensorBoard; does nothing on other ranks than the first."""

    def __init__(self, run: Path, first_rank: bool) -> None:
        """Open the run folder's logs for appending."""
        self._writer: SummaryWriter | None = None
        self._path = run / "metrics.jsonl"
        if first_rank:
            self._lines = self._path.open("a", encoding="utf-8")
            self._writer = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, phase: str, *, step: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Record numbers of one step; None (undefined) is recorded as null and left out of TensorBoard."""
        if self._writer is None:
            return
        self._lines.write(json.dumps({"step": step, "epoch": epoch, "phase": phase, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{phase}/{name}", value, step)

    def rewind(self, step: int, epochs: int | None = None) -> None:
        """Forget the lines that a resumed run writes again.

        Args:
            step: Lines of later steps are forgotten.
            epochs: So are those of epochs from this number on, if it is given.
        """
        if self._writer is None:
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
        """Flush and close the files."""
        if self._writer is not None:
            self._lines.close()
            self._writer.close()
            self._writer = None
