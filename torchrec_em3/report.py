"""Run folders to one self-contained HTML page: what content changed, and everything needed to judge it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from torchrec_em3 import __version__
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.remote_folder import local_folder
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.item_attention import ItemAttention
from torchrec_em3.number_format import FILTERS
from torchrec_em3.plan_measured import MEASURED_NOTE
from torchrec_em3.plots import dot_outline
from torchrec_em3.report_ablation import ablations
from torchrec_em3.report_alignment import alignment_histograms
from torchrec_em3.report_attention import attention_cards
from torchrec_em3.report_cold_start import RESAMPLES, cold_start_curves
from torchrec_em3.report_maps import embedding_maps
from torchrec_em3.report_neighbours import contact_sheet
from torchrec_em3.report_sections import (
    config_differences,
    curves,
    data_summaries,
    plans,
    reliability,
    run_rows,
    slices,
    version_rows,
)
from torchrec_em3.report_tasks import task_rows
from torchrec_em3.run_folder import check_data
from torchrec_em3.run_record import RunRecord, read_records
from torchrec_em3.variants import group_variants
from torchrec_em3.verdict import compare

__all__ = ["AttentionReading", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class AttentionReading:
    """What the content tower of one run attends to, for `write_report`.

    Attributes:
        run: Name of the run.
        items: The items, rows of `data`.
        data: The run's prepared folder.
    """

    run: str
    items: Sequence[ItemAttention]
    data: PreparedData


def write_report(
    runs: Sequence[Path],
    out: Path,
    data_folder: Path | None = None,
    images: Path | None = None,
    attention: AttentionReading | None = None,
) -> Path:
    """Write a page that compares runs; it needs neither network nor scripts.

    Whatever a run lacks, because it was stopped or is older, becomes a sentence on the page.

    Args:
        runs: Run folders, in the order of the page. ID-only runs are what the others are compared with.
        out: HTML file to write, in place of any that is there.
        data_folder: Prepared folder of all runs, if it is not where they were trained on it.
        images: Folder that the catalogue's pictures are relative to, to show items with their neighbours.
        attention: What a tower attends to, to be shown over pictures and texts.

    Returns:
        `out`.

    Raises:
        DataError: If a folder is not a run folder, `data_folder` is given and not a prepared folder, or `images` is
            given and not a folder.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: no such folder; give the one that the pictures were prepared from")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it")
    records = read_records(runs)
    data, unread = _open_data(records, data_folder)
    variants = group_variants(records)
    comparisons = compare(records, data)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            version=__version__,
            records=records,
            comparisons=comparisons,
            ablations=ablations(comparisons),
            cold_start=cold_start_curves(variants, data),
            resamples=RESAMPLES,
            alignment=alignment_histograms(variants),
            rows=run_rows(records),
            tasks=task_rows(records),
            slices=slices(records),
            curves=curves(records),
            reliability=reliability(records),
            maps=embedding_maps(records, data),
            sheet=contact_sheet(records, data, images),
            attention=_attention(attention, images),
            plans=plans(records),
            measured_note=MEASURED_NOTE,
            data=data_summaries(data),
            unread=unread,
            differences=config_differences(records),
            versions=version_rows(records),
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _attention(reading: AttentionReading | None, images: Path | None) -> dict[str, Any] | None:
    if reading is None:
        return None
    return {"run": reading.run, "cards": attention_cards(reading.items, reading.data, images)}


def _open_data(
    records: Sequence[RunRecord], data_folder: Path | None
) -> tuple[Mapping[str, PreparedData], Mapping[str, str]]:
    """Return the prepared folder of each run that can be opened, and why not for each other, by name of the run."""
    given = None if data_folder is None else PreparedData.open(data_folder)
    opened: dict[str, PreparedData] = {}
    unread: dict[str, str] = {}
    for record in records:
        try:
            data = given or _own_data(record, opened)
            check_data(record.folder, data)
            opened[record.name] = data
        except (ConfigError, DataError) as error:
            unread[record.name] = str(error)
    return opened, unread


def _own_data(record: RunRecord, opened: Mapping[str, PreparedData]) -> PreparedData:
    if not record.data_folder:
        raise DataError("the run's config names no prepared folder")
    folder = local_folder(record.data_folder)
    same = (data for data in opened.values() if data.folder == folder)
    return next(same, None) or PreparedData.open(folder)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.globals["shape"] = dot_outline
    return environment
