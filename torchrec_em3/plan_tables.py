"""The tables of a plan's page, as text cells: what Markdown and HTML are both filled from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrec_em3.number_format import three_digits
from torchrec_em3.plan_study import summary
from torchrec_em3.plan_text import format_bytes, lack, memory_name, rank_spans, remedy_rows, shortage_sentence

__all__ = ["TIME_PARTS", "Table", "comparison_table", "plan_tables", "verdict"]

MAX_RANK_ROWS = 16
TIME_PARTS = {"lookup": "lookup_ms", "communication": "communication_ms", "backward": "backward_ms"}
"""What the time of a rank is made of: names of the parts, and their keys in a plan."""


@dataclass(frozen=True)
class Table:
    """A table of the page: its first `words` columns are text, the others numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def verdict(plan: Mapping[str, Any]) -> str:
    """Say in a sentence or two whether a plan fits, to be read after its name."""
    if not plan["fits"]:
        return f"does not fit. {shortage_sentence(plan)}"
    most = summary(plan)
    memory = " and ".join(
        f"{format_bytes(most[f'{kind}_bytes'])} of {format_bytes(plan['memory_bytes'][kind])} {memory_name(plan, kind)}"
        for kind in ("hbm", "ddr")
        if most[f"{kind}_bytes"]
    )
    return f"fits. The fullest rank takes {memory}; the slowest spends {three_digits(most['perf_ms'])} ms a step."


def comparison_table(plans: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each plan: bank and dense parts are in its memory."""
    head = ["topology", "fits", "sharding", "ranks", "device memory", "host memory", "ms a step", *TIME_PARTS]
    return Table("Largest rank of each", head, [_outcome(plan) for plan in plans], words=3)


def _outcome(plan: Mapping[str, Any]) -> list[str]:
    most, label, world = summary(plan), plan["cluster"]["label"], str(plan["world_size"])
    if not most["fits"]:
        return [label, lack(plan, most), "-", world, *["-"] * 6]
    times = [three_digits(most[key]) for key in ("perf_ms", *TIME_PARTS.values())]
    memory = [format_bytes(most["hbm_bytes"]), format_bytes(most["ddr_bytes"])]
    return [label, "yes", "; ".join(most["shardings"]), world, *memory, *times]


def plan_tables(plan: Mapping[str, Any]) -> list[Table]:
    """Return the tables of one plan; where it does not fit, what would change that comes first."""
    tables = [_table_rows(plan), _budget_rows(plan)]
    if plan["fits"]:
        return [*tables, _rank_rows(plan)]
    head, *rows = remedy_rows(plan)
    remedies = Table("What would change that, each planned again by itself", head, rows, words=3)
    return [remedies, _shortage_rows(plan), *tables]


def _table_rows(plan: Mapping[str, Any]) -> Table:
    title = "Tables" if plan["fits"] else "Tables, in the planner's last attempt"
    head = ["table", "sharding", "kernel", "ranks", "rows", "dim", "weights", "device memory", "host memory"]
    rows = [
        [
            table["fqn"].rpartition(".")[2],
            table["sharding_type"],
            table["compute_kernel"],
            rank_spans(sorted({shard["rank"] for shard in table["shards"] if shard["rank"] is not None})),
            f"{table['rows']:,}",
            str(table["dim"]),
            *(format_bytes(table[f"{kind}_bytes"]) for kind in ("weight", "hbm", "ddr")),
        ]
        for table in plan["tables"]
    ]
    return Table(title, head, rows, words=4)


def _budget_rows(plan: Mapping[str, Any]) -> Table:
    budget, world = plan["budget"], plan["world_size"]
    where = memory_name(plan, "hbm" if plan["device"] == "cuda" else "ddr")
    rows = [
        [
            "content bank",
            f"{where}, by row",
            format_bytes(budget["bank_bytes"]),
            format_bytes(budget["bank_total_bytes"]),
        ],
        [
            f"dense parameters ({budget['dense_parameters']:,}), gradients, Adam's state, running average",
            f"{where}, on every rank",
            format_bytes(budget["dense_bytes"]),
            format_bytes(budget["dense_bytes"] * world),
        ],
        ["token store", "disk, memory-mapped", "-", format_bytes(plan["token_bytes"])],
    ]
    encoders = f"encoders above their cuts ({budget['encoder_parameters']:,} parameters), with what training adds"
    maps = "maps from raw ids to rows, by row, and raw ids of the catalogue"
    for name, key in ((encoders, "encoder"), (maps, "id_map")):
        if held := budget[f"{key}_bytes"]:
            rows.insert(-1, [name, where, format_bytes(held), format_bytes(held * world)])
    for kind in ("hbm", "ddr"):
        kept = budget["reserved_share"] * plan["memory_bytes"][kind]
        if kept:
            name = f"left to activations ({100 * budget['reserved_share']:.0f}%)"
            rows.append([name, memory_name(plan, kind), format_bytes(kept), format_bytes(kept * world)])
    return Table("Besides tables", ["what", "where", "a rank", "in all"], rows, words=2)


def _rank_rows(plan: Mapping[str, Any]) -> Table:
    """Return a row for all ranks alike, the slowest first, and how even each column is."""
    keys = ["perf_ms", *TIME_PARTS.values()]
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank in sorted(plan["ranks"], key=lambda rank: -rank["perf_ms"]):
        memory = (format_bytes(rank["hbm_bytes"]), format_bytes(rank["ddr_bytes"]))
        cells = (str(rank["num_shards"]), *memory, *(three_digits(rank[key]) for key in keys))
        alike.setdefault(cells, []).append(rank["rank"])
    rows = [[rank_spans(sorted(ranks)), *cells] for cells, ranks in list(alike.items())[:MAX_RANK_ROWS]]
    hidden = sum(map(len, list(alike.values())[MAX_RANK_ROWS:]))
    if hidden:
        rows.append([f"and {hidden} faster ranks", *[""] * 7])
    even = [plan["imbalance"][load] for load in ("hbm_bytes", "ddr_bytes", "perf_ms")]
    rows.append(["largest over mean", "", *("-" if value is None else f"{value:.2f}" for value in even), "", "", ""])
    head = ["ranks", "shards", "device memory", "host memory", "ms a step", *TIME_PARTS]
    return Table("Ranks: what the tables take", head, rows)


def _shortage_rows(plan: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{shortage['sharding_type']}, {shortage['compute_kernel']}",
            f"{memory_name(plan, shortage['memory'])}, {shortage['scope']}",
            *(format_bytes(shortage[f"{name}_bytes"]) for name in ("need", "have", "over")),
        ]
        for shortage in plan["shortages"]
    ]
    head = ["way to shard", "violated by most", "a rank needs", "a rank has", "too little by"]
    return Table("What is violated, the nearest to fitting first", head, rows, words=2)
