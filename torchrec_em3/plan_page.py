"""Plans as Markdown and as one self-contained HTML page; both are filled from the same tables."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from torchrec_em3 import __version__
from torchrec_em3.number_format import three_digits
from torchrec_em3.plan_chart import Part, Stack, stacked_bars
from torchrec_em3.plan_measured import MEASURED_NOTE
from torchrec_em3.plan_tables import TIME_PARTS, Table, comparison_table, plan_tables, verdict
from torchrec_em3.plan_text import fixed_bytes, format_bytes, to_text

__all__ = ["to_html", "to_markdown"]

TEMPLATES = Path(__file__).parent / "templates"
MAX_BARS = 16
SAME_LOAD = 0.005
"""Neighbours whose loads differ by less, relatively, share a bar."""
MEMORY_PARTS = (
    ("tables", 1),
    ("content bank", 2),
    ("dense parts", 3),
    ("encoders", 4),
    ("maps of raw ids", 5),
    ("left to activations", 0),
)
"""What the memory of a rank is made of, and the colour of each part."""
NOTE = (
    "TorchRec's estimates: memory of weights, optimizer state, inputs and outputs; time of a step's lookups and "
    "exchanges, from bandwidths alone. A real step also has dense layers, and looks up each distinct item only once."
)


def to_markdown(plans: Sequence[Mapping[str, Any]], facts: Mapping[str, str], measured: Table | None = None) -> str:
    """Return the plans as Markdown.

    Args:
        plans: What `torchrec_em3.plan_study.study` returned.
        facts: What was planned, by name.
        measured: What a trained run took (see `torchrec_em3.plan_measured`).
    """
    lines = [f"# {_title(plans)}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [*(f"- {plan['cluster']['label']} {verdict(plan)}" for plan in plans), "", NOTE]
    if len(plans) > 1:
        lines += ["", "## Comparison", *_markdown_table(comparison_table(plans))]
    for plan in plans:
        lines += ["", f"## {plan['cluster']['label']}"]
        for table in plan_tables(plan):
            lines += ["", f"### {table.title}", *_markdown_table(table)]
    if measured is not None:
        lines += ["", f"## {measured.title}", *_markdown_table(measured), "", MEASURED_NOTE]
    return "\n".join(lines) + "\n"


def to_html(plans: Sequence[Mapping[str, Any]], facts: Mapping[str, str], measured: Table | None = None) -> str:
    """Return the plans as a page that needs neither network nor scripts; arguments as for `to_markdown`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [
        {
            "name": plan["cluster"]["label"],
            "fits": plan["fits"],
            "verdict": verdict(plan),
            "tables": plan_tables(plan),
            "charts": _charts(_rank_blocks(plan)),
            "text": to_text(plan),
            "torchrec_text": plan["torchrec_text"],
        }
        for plan in plans
    ]
    return environment.get_template("plan.html").render(
        version=__version__,
        title=_title(plans),
        facts=facts,
        note=NOTE,
        sections=sections,
        comparison=comparison_table(plans),
        measured=measured,
        measured_note=MEASURED_NOTE,
        charts=_charts([(plan["cluster"]["label"], plan, _largest(plan)) for plan in plans]),
        memory_parts=[part for part in MEMORY_PARTS if any(_has_part(plan, part[0]) for plan in plans)],
        time_parts=[(name, series) for series, name in enumerate(TIME_PARTS, 1)],
    )


def _title(plans: Sequence[Mapping[str, Any]]) -> str:
    return "Sharding plan for " + ", ".join(plan["cluster"]["label"] for plan in plans)


def _has_part(plan: Mapping[str, Any], part: str) -> bool:
    """Return whether the legend has to name a part of the memory; those that few models have are left out."""
    rare = {"encoders": "encoder_bytes", "maps of raw ids": "id_map_bytes"}
    return part not in rare or plan["budget"][rare[part]] > 0


def _largest(plan: Mapping[str, Any]) -> dict[str, float]:
    """Return what tables take on the fullest and the slowest rank, or would in the way to shard nearest to fitting."""
    if plan["fits"]:
        return _most(plan["ranks"])
    loads = dict.fromkeys(("hbm_bytes", "ddr_bytes", *TIME_PARTS.values()), 0.0)
    if plan["shortages"]:
        nearest = plan["shortages"][0]
        loads[f"{nearest['memory']}_bytes"] = nearest["need_bytes"] - fixed_bytes(plan, nearest["memory"])
    return loads


def _most(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    slowest = max(ranks, key=lambda rank: rank["perf_ms"])
    memory = {key: max(rank[key] for rank in ranks) for key in ("hbm_bytes", "ddr_bytes")}
    return {**memory, **{key: slowest[key] for key in TIME_PARTS.values()}}


def _rank_blocks(plan: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], dict[str, float]]]:
    """Return up to 16 groups of neighbouring ranks, each with its largest loads; none if all ranks are alike."""
    if not plan["fits"]:
        return []
    ranks = plan["ranks"]
    blocks: list[list[Any]] = []
    for part in np.array_split(np.arange(len(ranks)), min(len(ranks), MAX_BARS)):
        load = _most([ranks[i] for i in part])
        if blocks and all(math.isclose(value, blocks[-1][2][key], rel_tol=SAME_LOAD) for key, value in load.items()):
            blocks[-1][1] = part[-1]
        else:
            blocks.append([part[0], part[-1], load])
    names = [f"rank {first}" if first == last else f"ranks {first}-{last}" for first, last, _ in blocks]
    return [(name, plan, load) for name, (*_, load) in zip(names, blocks, strict=True)] if len(blocks) > 1 else []


def _charts(bars: Sequence[tuple[str, Mapping[str, Any], Mapping[str, float]]]) -> list[dict[str, Any]]:
    charts = []
    for kind, title in (("hbm", "Device memory of a rank"), ("ddr", "Host memory of a rank")):
        stacks = [_memory_stack(*bar, kind) for bar in bars if _memory(bar[1], bar[2], kind)]
        charts.append({"title": title, "chart": stacked_bars(stacks, title, format_bytes), "legend": "memory"})
    stacks = [
        Stack(
            name,
            [Part(part, series, load[key]) for series, (part, key) in enumerate(TIME_PARTS.items(), 1)],
            _milliseconds(sum(load[key] for key in TIME_PARTS.values())),
        )
        for name, plan, load in bars
        if plan["fits"]
    ]
    title = "Estimated time of a step"
    charts.append({"title": title, "chart": stacked_bars(stacks, title, _milliseconds), "legend": "time"})
    return [chart for chart in charts if chart["chart"]]


def _milliseconds(value: float) -> str:
    return f"{three_digits(value)} ms"


def _memory(plan: Mapping[str, Any], load: Mapping[str, float], kind: str) -> float:
    return load[f"{kind}_bytes"] + fixed_bytes(plan, kind)


def _memory_stack(name: str, plan: Mapping[str, Any], load: Mapping[str, float], kind: str) -> Stack:
    budget, capacity = plan["budget"], plan["memory_bytes"][kind]
    kinds = ("bank", "dense", "encoder", "id_map")
    fixed = [budget[f"{part}_bytes"] if fixed_bytes(plan, kind) else 0 for part in kinds]
    values = (load[f"{kind}_bytes"], *fixed, budget["reserved_share"] * capacity)
    parts = [
        Part(part, series, value, part == MEMORY_PARTS[-1][0])
        for (part, series), value in zip(MEMORY_PARTS, values, strict=True)
    ]
    return Stack(name, parts, f"{format_bytes(_memory(plan, load, kind))} of {format_bytes(capacity)}", capacity)


def _markdown_table(table: Table) -> list[str]:
    rule = ["---" if i < table.words else "---:" for i in range(len(table.head))]
    rows = [table.head, rule, *table.rows]
    return ["", *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]
