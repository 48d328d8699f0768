"""A sharding plan as text for a terminal and for a run's `plan.txt`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "budget_sentence",
    "fixed_bytes",
    "format_bytes",
    "lack",
    "measured_rows",
    "memory_name",
    "rank_spans",
    "remedy_rows",
    "shortage_sentence",
    "to_text",
]

MAX_RANK_ROWS = 16
WORDS = ("table", "sharding", "kernel", "ranks", "change", "fits", "what to set")
"""Columns that are text."""


def to_text(plan: Mapping[str, Any]) -> str:
    """Return the plan as text: a line a table, a line a rank, and how even the load is.

    Args:
        plan: `PlanReport.as_dict()`, or the same read back from JSON.
    """
    if "world_size" not in plan:
        return "No sharding plan: the model has no tables to shard."
    hosts = -(-plan["world_size"] // plan["local_world_size"])
    lines = [
        f"Sharding plan for {_name(plan)}{plan['world_size']} x {plan['device']} on {hosts} host{'s' * (hosts > 1)}, "
        f"batch {plan['batch_size']} a rank ({plan['proposals']} proposals, {plan['planning_seconds']:.1f} s)"
    ]
    if plan.get("budget"):
        lines.append(budget_sentence(plan))
    if not plan["fits"]:
        lines += ["", _shortage(plan)]
    lines += ["", *_aligned_columns(_table_rows(plan["tables"]))]
    if plan.get("remedies"):
        lines += ["", "What would change that, each planned again by itself:", *_aligned_columns(remedy_rows(plan))]
    if plan["fits"]:
        lines += ["", *_aligned_columns(_rank_rows(plan["ranks"])), "", _imbalance_line(plan["imbalance"])]
    if plan.get("measured"):
        lines += ["", "Planned and measured:", *_aligned_columns(measured_rows(plan))]
    return "\n".join(lines)


def _name(plan: Mapping[str, Any]) -> str:
    name = plan.get("cluster", {}).get("name")
    return f"{name}: " if name else ""


def format_bytes(count: float) -> str:
    """Return a byte count with three significant digits and a binary unit."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 999.5 and unit != "TiB":
        size, unit = size / 1024, next(units)
    if unit == "B" or size >= 99.95:
        return f"{size:.0f} {unit}"
    return f"{size:.{1 if size >= 9.995 else 2}f} {unit}"


def memory_name(plan: Mapping[str, Any], kind: str) -> str:
    """Return what a kind of memory, "hbm" or "ddr", is called on the plan's machines."""
    return "device memory" if kind == "hbm" else "host memory" if plan["device"] == "cuda" else "memory"


def shortage_sentence(plan: Mapping[str, Any]) -> str:
    """Say what a plan that does not fit lacks, by the way to shard that is nearest to fitting."""
    if not plan["shortages"]:
        return "There is room on average and for the largest shard, but the shards could not be packed into the ranks."
    nearest = plan["shortages"][0]
    need, have, over = (format_bytes(nearest[f"{name}_bytes"]) for name in ("need", "have", "over"))
    who = "a rank needs on average" if nearest["scope"] == "mean" else "the rank of the largest shard needs"
    return (
        f"Nearest to fitting: {nearest['sharding_type']} with {nearest['compute_kernel']}, where {who} {need} of "
        f"{memory_name(plan, nearest['memory'])} and has {have}: {over} too little."
    )


def budget_sentence(plan: Mapping[str, Any]) -> str:
    """Say what each rank holds besides tables."""
    budget = plan["budget"]
    parts = [f"{format_bytes(budget['dense_bytes'])} of dense parameters with gradients and Adam's state"]
    if budget["bank_bytes"]:
        parts.insert(0, f"{format_bytes(budget['bank_bytes'])} of the content bank")
    if budget["encoder_bytes"]:
        parts.append(f"{format_bytes(budget['encoder_bytes'])} of encoders")
    if budget["id_map_bytes"]:
        parts.append(f"{format_bytes(budget['id_map_bytes'])} of maps from raw ids")
    kept = f"{100 * budget['reserved_share']:.0f}% of the memory is left to activations"
    return f"Besides tables a rank holds {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}; {kept}."


def lack(plan: Mapping[str, Any], most: Mapping[str, Any]) -> str:
    """Say whether a plan fits, or what a rank lacks at least; `most` is its summary."""
    if most["fits"]:
        return "yes"
    if not most["over_bytes"]:
        return "no: packing into ranks failed"
    return f"no: {format_bytes(most['over_bytes'])} of {memory_name(plan, most['memory'])} a rank too little"


def remedy_rows(plan: Mapping[str, Any]) -> list[list[str]]:
    """Return a head line and a line for each remedy of a plan that does not fit."""
    rows = [["change", "fits", "what to set", "device mem", "host mem", "ms a step"]]
    for remedy in plan["remedies"]:
        if not remedy["fits"]:
            why = f"no: {remedy['error']}" if "error" in remedy else lack(plan, remedy)
            rows.append([remedy["name"], why, remedy["options"], "-", "-", "-"])
            continue
        memory = (format_bytes(remedy["hbm_bytes"]), format_bytes(remedy["ddr_bytes"]))
        rows.append([remedy["name"], "yes", remedy["options"], *memory, f"{remedy['perf_ms']:.3g}"])
    return rows


def measured_rows(plan: Mapping[str, Any]) -> list[list[str]]:
    """Return a head line and a line for each of the slowest ranks of a trained run: what was planned, what it took.

    Args:
        plan: A run's `plan.json`, with `measured`: a mapping for each rank, see `rank_measurements`.
    """
    slowest = sorted(plan["measured"], key=lambda taken: -(taken["step_ms"] or 0.0))[:MAX_RANK_ROWS]
    kinds = {"hbm": "device", "ddr": "host"} if plan["device"] == "cuda" else {"ddr": "host"}
    head = ["rank", "tables planned", "held"]
    for name in kinds.values():
        head += [f"{name} mem planned", "peak"]
    rows = [[*head, "ms planned", "a step", "loading", "computing", "processor"]]
    for taken in sorted(slowest, key=lambda taken: int(taken["rank"])):
        rank = plan["ranks"][taken["rank"]]
        cells = [str(taken["rank"]), format_bytes(rank["table_bytes"]), format_bytes(taken["table_bytes"])]
        for kind in kinds:
            peak = taken["peak_device_bytes" if kind == "hbm" else "peak_rss_bytes"]
            cells += [format_bytes(rank[f"{kind}_bytes"] + fixed_bytes(plan, kind)), format_bytes(peak)]
        times = [rank["perf_ms"], *(taken[f"{part}_ms"] for part in ("step", "loading", "computing", "processor"))]
        rows.append([*cells, *("-" if time is None else f"{time:.3g}" for time in times)])
    hidden = len(plan["measured"]) - len(slowest)
    return rows + [[f"... and {hidden} faster ranks"]] * (hidden > 0)


def fixed_bytes(plan: Mapping[str, Any], kind: str) -> int:
    """Return what a rank holds besides tables of a kind of memory, "hbm" or "ddr"."""
    here = kind == ("hbm" if plan["device"] == "cuda" else "ddr")
    return int(plan["budget"]["fixed_bytes"]) if here else 0


def _imbalance_line(imbalance: Mapping[str, float | None]) -> str:
    names = {"hbm_bytes": "device memory", "ddr_bytes": "host memory", "perf_ms": "time"}
    parts = [f"{names[load]} {value:.2f}" for load, value in imbalance.items() if value is not None]
    return "Largest rank over mean: " + ", ".join(parts)


def _shortage(plan: Mapping[str, Any]) -> str:
    weights = sum(table["weight_bytes"] for table in plan["tables"])
    return (
        f"Nothing fits. The weights alone take {format_bytes(weights)}.\n{shortage_sentence(plan)}\n"
        "Use more ranks, more memory, smaller tables or fewer constraints. The last attempt:"
    )


def _table_rows(tables: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["table", "rows", "dim", "sharding", "kernel", "shards", "ranks", "device mem", "host mem", "max ms"]]
    for table in tables:
        holders = sorted({shard["rank"] for shard in table["shards"] if shard["rank"] is not None})
        rows.append(
            [
                table["fqn"],
                f"{table['rows']:,}",
                str(table["dim"]),
                table["sharding_type"],
                table["compute_kernel"],
                str(len(table["shards"])),
                rank_spans(holders),
                format_bytes(table["hbm_bytes"]),
                format_bytes(table["ddr_bytes"]),
                f"{_slowest_rank_ms(table['shards']):.3g}",
            ]
        )
    return rows


def _slowest_rank_ms(shards: Iterable[Mapping[str, Any]]) -> float:
    by_rank: dict[Any, float] = {}
    for place, shard in enumerate(shards):
        holder = f"shard {place}" if shard["rank"] is None else shard["rank"]
        by_rank[holder] = by_rank.get(holder, 0.0) + shard["perf_ms"]
    return max(by_rank.values(), default=0.0)


def rank_spans(ranks: Sequence[int]) -> str:
    """Return sorted ranks as "0-7, 12", shortened after the third span."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [f"{first}-{last}" if last > first else str(first) for first, last in spans]
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "") or "-"


def _rank_rows(ranks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return one row for all ranks with the same load, the slowest first."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank in sorted(ranks, key=lambda rank: -rank["perf_ms"]):
        memory = format_bytes(rank["hbm_bytes"]), format_bytes(rank["ddr_bytes"])
        times = [f"{rank[time]:.3g}" for time in ("perf_ms", "lookup_ms", "communication_ms", "backward_ms")]
        alike.setdefault((str(rank["num_shards"]), *memory, *times), []).append(rank["rank"])
    rows = [["ranks", "shards", "device mem", "host mem", "ms", "lookup", "communication", "backward"]]
    rows += [[rank_spans(sorted(members)), *cells] for cells, members in list(alike.items())[:MAX_RANK_ROWS]]
    hidden = sum(map(len, list(alike.values())[MAX_RANK_ROWS:]))
    return rows + [[f"... and {hidden} faster ranks"]] * (hidden > 0)


def _aligned_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to columns: numbers to the right, words to the left; the last line may be a single remark."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    words = {i for i, name in enumerate(rows[0]) if name in WORDS}
    lines = []
    for row in rows:
        if len(row) < len(rows[0]):
            lines.append(row[0])
            continue
        padded = [row[i].ljust(w) if i in words else row[i].rjust(w) for i, w in enumerate(widths)]
        lines.append("  ".join(padded).rstrip())
    return lines
