"""A run folder as the report reads it: whatever is there, and a sentence for whatever is not."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from torchrec_em3.errors import DataError

__all__ = ["CONFIG_FILE", "Embeddings", "Place", "RunRecord", "TestRows", "flatten", "read_record", "read_records"]

CONFIG_FILE, DATA_FILE = "config.yaml", "data.json"
ID_ONLY = "none"

Content = TypeVar("Content")


@dataclass(frozen=True)
class Embeddings:
    """Vectors of a sample of items; n items, width D.

    Attributes:
        item: Catalogue rows, int64 [n].
        id: ID embeddings, float32 [n, D].
        content: Content embeddings, float32 [n, D], or None for an ID-only run.
        present: Whether the item has any content, bool [n].
        known: Whether the item has an ID embedding of its own, bool [n].
        aligned_content: Content as the alignment loss compares it, unit vectors, float32 [n, E]; None where the run had
            no such loss, or kept none.
        aligned_id: As `aligned_content`, of the ID.
    """

    item: NDArray[np.int64]
    id: NDArray[np.float32]
    content: NDArray[np.float32] | None
    present: NDArray[np.bool_]
    known: NDArray[np.bool_]
    aligned_content: NDArray[np.float32] | None
    aligned_id: NDArray[np.float32] | None


@dataclass(frozen=True)
class TestRows:
    """Predictions of the test split, aligned columns in the split's order."""

    __test__ = False

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    label: NDArray[np.float32]
    logit: NDArray[np.float32]


class Place(NamedTuple):
    """What runs must share to be compared: path or URL of the data, split, and content hash."""

    data: str
    split: str
    data_hash: str


@dataclass(frozen=True)
class RunRecord:
    """One run, read whole.

    Attributes:
        folder: Where it lies.
        name: Short name, unique among the runs that were read together.
        config: Resolved options; `config_text` is the file as it stands.
        summary: `summary.json`, empty if the run has not been evaluated.
        versions: Version by package.
        data_hash: Content hash of the data it was trained on; empty if the run did not record it.
        plan: `PlanReport.as_dict()`, or None; `plan_text` is `plan.txt`.
        log: Lines of `metrics.jsonl` in order.
        embeddings: Vectors for the map, or None.
        test_rows: Predictions of the test split, or None.
        gaps: One sentence for each thing that is missing or damaged.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    summary: Mapping[str, Any]
    versions: Mapping[str, str]
    data_hash: str
    plan: Mapping[str, Any] | None
    plan_text: str
    log: Sequence[Mapping[str, Any]]
    embeddings: Embeddings | None
    test_rows: TestRows | None
    gaps: Sequence[str] = field(default_factory=tuple)

    def part(self, kind: str) -> str:
        """Return the name of a model part, for example "content"; "none" where there is none."""
        model = self.config.get("model") or {}
        name = (self.summary.get("model") or {}).get(kind, model.get(kind))
        return str(name) if name else ID_ONLY

    @property
    def uses_content(self) -> bool:
        """Whether the model had a content tower."""
        return self.part("content") != ID_ONLY

    @property
    def kind(self) -> str:
        """The model in a few words; models of one kind may still differ in their options."""
        if not self.uses_content:
            return "ID only"
        return f"{self.part('content')}, history {self.part('history')}"

    @property
    def seed(self) -> Any:
        """Seed of the run, or None."""
        return self.summary.get("seed", self.config.get("seed"))

    @property
    def place(self) -> Place:
        """Data and split: what runs must share to be compared."""
        return Place(str(self.config.get("data")), str(self.summary.get("split")), self.data_hash)

    @property
    def data_folder(self) -> str:
        """Path or URL of the prepared folder that the run was trained on; empty if the config names none."""
        return str(self.config.get("data") or "")

    @property
    def test(self) -> Mapping[str, Any]:
        """Metrics of the test split; empty if the run has not been evaluated."""
        return self.summary.get("test") or {}


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs to be shown together, under names that tell them apart.

    Args:
        folders: Run folders, at least one.

    Raises:
        DataError: If a folder is not a run, or none is given.
    """
    if not folders:
        raise DataError("no run to report on; give at least one run folder")
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return [
        read_record(folder, "/".join(path.parts[-depth:]).lstrip("/"))
        for folder, path in zip(folders, paths, strict=True)
    ]


def read_record(folder: Path, name: str | None = None) -> RunRecord:
    """Read one run folder; anything but its config may be missing or damaged.

    Args:
        folder: Run folder, as `em3 train` leaves it, finished or not.
        name: What the report calls the run; the folder's name if left out.

    Raises:
        DataError: If the folder has no readable config.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{folder} is not a run folder: it has no {CONFIG_FILE}; give the --run folder of `em3 train`")
    try:
        config_text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(config_text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not YAML ({str(error).splitlines()[0]}); is {folder} a run folder?") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} holds no options; is {folder} a run folder?")
    gaps: list[str] = []
    plan = _load(folder / "plan.json", _json_object, gaps, "the sharding plan is not known")
    if not list((folder / "tensorboard").glob("events*")):
        gaps.append("There are no TensorBoard events; the curves below come from metrics.jsonl.")
    return RunRecord(
        folder=folder,
        name=name or folder.resolve().name,
        config=config,
        config_text=config_text,
        summary=_load(folder / "summary.json", _json_object, gaps, "the run was stopped before its evaluation") or {},
        versions=_load(folder / "versions.json", _json_object, gaps, "versions are not known") or {},
        data_hash=str((_load(folder / DATA_FILE, _json_object, [], "") or {}).get("content_hash", "")),
        plan=plan,
        plan_text=_load(folder / "plan.txt", _text, [], "") or "",
        log=_read_log(folder / "metrics.jsonl", gaps),
        embeddings=_load(folder / "embeddings.npz", _read_embeddings, gaps, "there is no map of its items"),
        test_rows=_load(folder / "predictions" / "test.npz", _read_test_rows, gaps, "reliability cannot be shown"),
        gaps=gaps,
    )


def _load(path: Path, read: Callable[[Path], Content], gaps: list[str], consequence: str) -> Content | None:
    """Return what `read` makes of the file; if it is missing or damaged, None and a sentence in `gaps`."""
    if not path.is_file():
        gaps.append(f"There is no {path.name}: {consequence}.")
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        gaps.append(f"{path.name} cannot be read ({reason}): {consequence}.")
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(_text(path))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _read_log(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    lines = (_load(path, _text, gaps, "there are no curves") or "").splitlines()
    entries, damaged = [], 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            damaged += 1
    if damaged:
        gaps.append(f"{damaged} of {len(lines)} lines of {path.name} cannot be read and are left out.")
    return entries


def _read_embeddings(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as arrays:
        columns = dict(arrays)
    item = columns["item"]
    for name, column in columns.items():
        if len(column) != len(item):
            raise ValueError(f"{len(item)} items, but {len(column)} rows of {name}")
    every = np.ones(len(item), dtype=bool)
    return Embeddings(
        item=item,
        id=columns["id"],
        content=columns.get("content"),
        present=columns.get("present", every).astype(bool),
        known=columns.get("known", every).astype(bool),
        aligned_content=columns.get("aligned_content"),
        aligned_id=columns.get("aligned_id"),
    )


def _read_test_rows(path: Path) -> TestRows:
    with np.load(path, allow_pickle=False) as arrays:
        rows = TestRows(arrays["user"], arrays["item"], arrays["label"], arrays["logit"])
    if len({len(column) for column in vars(rows).values()}) != 1:
        raise ValueError("columns of different lengths")
    if not (np.isfinite(rows.logit).all() and np.isin(rows.label, (0, 1)).all()):
        raise ValueError("logits that are not finite or labels other than 0 and 1")
    return rows
