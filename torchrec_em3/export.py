"""From a trained run to a package: tables, content, vocabularies and the dense graph, checked against the model.

Shape letters: I item rows (row 0, "unknown", included), D width.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError
from torchrec_em3.export_parity import Parity, measure_parity
from torchrec_em3.export_tables import CatalogueContent, catalogue_codes, catalogue_content, id_tables
from torchrec_em3.process_group import Ranks
from torchrec_em3.runlog import write_json
from torchrec_em3.serving.package import (
    CONFIG_FILE,
    GRAPH_FILE,
    ITEMS_FILE,
    TABLES_FILE,
    USERS_FILE,
    PackageConfig,
    vocabulary_file,
    write_manifest,
)
from torchrec_em3.serving.rows import Precision, pack_rows
from torchrec_em3.serving.scorer import Scorer
from torchrec_em3.serving_graph import ServingGraph, export_graph
from torchrec_em3.tensor_files import make_readable
from torchrec_em3.trained_run import TrainedRun

__all__ = ["Exported", "check_exportable", "export_package", "new_folder"]


class Exported(NamedTuple):
    """What came of an export.

    Attributes:
        version: Name of the package.
        parity: How its logits compare with the model's.
        table_bytes: Size of its tables and content.
        float_bytes: Size of the same in float32.
        package_bytes: Size of all its files.
    """

    version: str
    parity: Parity
    table_bytes: int
    float_bytes: int
    package_bytes: int


def export_package(trained: TrainedRun, out: Path, precision: Precision, ranks: Ranks) -> Exported:
    """Write a package that scores as the run does, or nothing.

    Args:
        trained: The run; nothing of it changes but the content bank, which is refreshed.
        out: Folder to make.
        precision: How tables and content are stored; the dense graph stays float32.
        ranks: A single process.

    Raises:
        ConfigError: If `out` exists, or for `check_exportable`.
        NumericError: If the package's scores on the validation split differ from the model's by more than
            `export_parity` allows.
    """
    check_exportable(ranks)
    model = trained.sharded.model
    with new_folder(out) as folder:
        content = None
        if model.content is not None:
            content = catalogue_content(model.content, model.item_rows, ranks.device)
        widths, float_bytes = _write_tensors(folder, trained, content, precision, ranks.device)
        _write_vocabularies(folder, trained.data)
        config = _config(folder, trained, precision, widths)
        write_json(folder / CONFIG_FILE, config.as_dict())
        parity = measure_parity(Scorer(folder), trained, content, ranks)
        config = dataclasses.replace(config, parity=parity._asdict())
        write_json(folder / CONFIG_FILE, config.as_dict())
        write_manifest(folder)
        package_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(config.version, parity, (out / TABLES_FILE).stat().st_size, float_bytes, package_bytes)


def check_exportable(ranks: Ranks) -> None:
    """Raise ConfigError for several processes, none of which holds whole tables."""
    if ranks.world_size > 1:
        raise ConfigError(f"em3 export runs in one process, not in {ranks.world_size}; start it without torchrun")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Lend a folder beside `out` that becomes `out` at the end, and is removed if anything is raised.

    Raises:
        ConfigError: If `out` exists or cannot be made.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists, and a package in use must not change; choose another folder")
    folder = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from error
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(
    folder: Path, trained: TrainedRun, content: CatalogueContent | None, precision: Precision, device: torch.device
) -> tuple[dict[str, int], int]:
    """Write the tables and the graph; return the width of each table, and the bytes of all of them in float32."""
    model = trained.sharded.model
    rows, others = id_tables(trained, device)
    if content is not None:
        rows["content"] = content.target_ID
        if content.history is not None and content.history.valid_V is not None:
            others["has_content"] = content.history.valid_V
            # Where histories read the bank, its rows are the very content of the targets.
            if not torch.equal(content.history.rows_VD, content.target_ID):
                rows["history_content"] = content.history.rows_VD
    if model.codes is not None:
        codes = catalogue_codes(model.codes, model.item_rows, device)
        assert codes.valid_V is not None
        rows["codes"], others["has_codes"] = codes.rows_VD, codes.valid_V
    packed = {name: pack_rows(table, precision) for name, table in rows.items()}
    save_file({**packed, **others}, folder / TABLES_FILE)
    make_readable(folder / TABLES_FILE)
    num_dense = len(trained.data.dense_features)
    graph = ServingGraph(model, num_dense, None if content is None else content.history)
    torch.export.save(export_graph(graph, trained.config.model.embedding_dim), folder / GRAPH_FILE)
    float_bytes = sum(table.numel() * 4 for table in rows.values()) + sum(other.nbytes for other in others.values())
    return {name: table.shape[1] for name, table in rows.items()}, float_bytes


def _write_vocabularies(folder: Path, data: PreparedData) -> None:
    """Write raw ids in the order of their rows, without row 0; and the values of the categorical features, by row."""
    side_features = data.user_feature_names[1:]
    _write_table(data.items.select(["raw_id"]).slice(1), folder / ITEMS_FILE)
    _write_table(data.users.select(["raw_id", *side_features]).slice(1), folder / USERS_FILE)
    (folder / "vocab").mkdir()
    for name in (*side_features, *(feature.name for feature in data.sparse_features)):
        _write_table(pa.table({"value": data.vocabulary(name)}), folder / vocabulary_file(name))


def _write_table(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _config(folder: Path, trained: TrainedRun, precision: Precision, widths: Mapping[str, int]) -> PackageConfig:
    """Describe the package whose tensors and graph are in `folder`."""
    model, data = trained.sharded.model, trained.data
    digest = hashlib.sha256()
    for name in (TABLES_FILE, GRAPH_FILE):
        digest.update((folder / name).read_bytes())
    return PackageConfig(
        version=f"step-{model.step}-{precision}-{digest.hexdigest()[:8]}",
        precision=precision,
        width=trained.config.model.embedding_dim,
        max_history=trained.config.loader.max_history,
        user_features=tuple(data.user_feature_names),
        known_users=data.known_users,
        known_items=data.known_items,
        content=model.content is not None,
        content_history=model.content is not None and model.content.history is not None,
        codes=model.codes is not None,
        tasks=tuple(data.tasks),
        sparse=tuple(feature.name for feature in data.sparse_features),
        dense=tuple(data.dense_features),
        widths=widths,
        origin=trained.origin,
    )
