"""What the sharding planner decided: tables, shards and the estimated load of each rank, as JSON and as text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    PlanDebugStats,
    Shard,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan

__all__ = ["LOADS", "PlanReport", "format_bytes", "to_json", "to_text"]

LOADS = ("hbm_bytes", "ddr_bytes", "perf_ms")
"""Estimates of a shard and of a rank: memory on the device, memory of the host, time of one step."""

PERF_PARTS = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "prefetch_compute", "input_dist_comms")

MAX_RANK_ROWS = 16


class PlanReport(Stats):
    """Planner hook that keeps the chosen plan: `EmbeddingShardingPlanner(..., stats=report.stats)`.

    The planner also calls it when nothing fits; then `as_dict()["fits"]` is False and the tables are those of its last
    attempt, without ranks. Before any call the report is that of a model without tables.
    """

    def __init__(self) -> None:
        """Create a report without a plan."""
        self._plan: dict[str, Any] = {"fits": True, "tables": [], "ranks": [], "imbalance": dict.fromkeys(LOADS)}

    @property
    def stats(self) -> list[Stats]:
        """Hooks to hand to the planner: this report."""
        return [self]

    def log(
        self,
        sharding_plan: ShardingPlan,
        topology: Topology,
        batch_size: int,
        storage_reservation: StorageReservation,
        num_proposals: int,
        num_plans: int,
        run_time: float,
        best_plan: list[ShardingOption],
        constraints: dict[str, ParameterConstraints] | None = None,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        enumerator: Enumerator | None = None,
        debug: bool = False,
        debug_stats: PlanDebugStats | None = None,
    ) -> None:
        """Take over the outcome of one planning; called by the planner, with TorchRec's own arguments."""
        fits = bool(sharding_plan.plan)
        ranks = _rank_loads(topology, storage_reservation, best_plan if fits else [])
        self._plan = {
            "fits": fits,
            "world_size": topology.world_size,
            "local_world_size": topology.local_world_size,
            "device": topology.compute_device,
            "batch_size": batch_size,
            "planning_seconds": run_time,
            "proposals": num_proposals,
            "plans": num_plans,
            "tables": [_table(option, fits) for option in best_plan],
            "ranks": ranks,
            "imbalance": {load: _imbalance([rank[load] for rank in ranks]) if fits else None for load in LOADS},
        }
        text = EmbeddingStats()
        text.log(
            sharding_plan,
            topology,
            batch_size,
            storage_reservation,
            num_proposals,
            num_plans,
            run_time,
            best_plan,
            constraints=constraints,
            sharders=sharders,
            enumerator=enumerator,
            debug=True,
            debug_stats=debug_stats,
        )
        # TorchRec offers its table to the log only; the attribute is read so that it can stand in a file.
        self._plan["torchrec_text"] = "\n".join(text._stats_table)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values: bytes, milliseconds a step, and ranks counted from 0.

        Returns:
            `fits`; `world_size`, `local_world_size` (ranks a host), `device`, `batch_size` (a rank);
            `planning_seconds`, `proposals` tried and `plans` that fitted; `tables`, each with `fqn`, `rows`, `dim`,
            `features`, `pooling_factors`, `sharding_type`, `compute_kernel`, `weight_bytes`, the sums of its shards'
            loads and `shards`; `ranks`, each with its loads, `num_shards` and what it has for tables
            (`hbm_available_bytes`, `ddr_available_bytes`); `imbalance`, the largest rank over the mean by load (1 is
            even, None where there is no load); `torchrec_text`, TorchRec's own statistics. Only `fits`, `tables`,
            `ranks` and `imbalance` are there before any planning.
        """
        return self._plan

    def as_text(self) -> str:
        """Return the plan as a table for a terminal."""
        return to_text(self._plan)


def to_json(plan: Mapping[str, Any]) -> str:
    """Return `PlanReport.as_dict()` as JSON, the content of a run's `plan.json`."""
    return json.dumps(plan, indent=1, allow_nan=False)


def to_text(plan: Mapping[str, Any]) -> str:
    """Return the plan as text: a line a table, a line a rank, and how even the load is.

    Args:
        plan: `PlanReport.as_dict()`, or the same read back from JSON.
    """
    if "world_size" not in plan:
        return "No sharding plan: the model has no tables to shard."
    hosts = -(-plan["world_size"] // plan["local_world_size"])
    lines = [
        f"Sharding plan for {plan['world_size']} x {plan['device']} on {hosts} host{'s' * (hosts > 1)}, "
        f"batch {plan['batch_size']} a rank ({plan['proposals']} proposals, {plan['planning_seconds']:.1f} s)"
    ]
    if not plan["fits"]:
        lines += ["", _shortage(plan)]
    lines += ["", *_aligned_columns(_table_rows(plan["tables"]))]
    if plan["fits"]:
        lines += ["", *_aligned_columns(_rank_rows(plan["ranks"])), "", _imbalance_line(plan["imbalance"])]
    return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Return a byte count with three significant digits and a binary unit."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 999.5 and unit != "TiB":
        size, unit = size / 1024, next(units)
    if unit == "B" or size >= 99.95:
        return f"{size:.0f} {unit}"
    return f"{size:.{1 if size >= 9.995 else 2}f} {unit}"


def _loads(shard: Shard) -> dict[str, float]:
    storage, perf = shard.storage, shard.perf
    return {
        "hbm_bytes": storage.hbm if storage else 0,
        "ddr_bytes": storage.ddr if storage else 0,
        "perf_ms": float(perf.total) if perf else 0.0,
    }


def _feature_names(option: ShardingOption) -> list[str]:
    """Read the names from the module: the planner's own option carries them only where a constraint names them."""
    module = option.module[1]
    configs = getattr(module, "embedding_bag_configs", None) or getattr(module, "embedding_configs", None)
    return [
        name for table in (configs() if configs else []) if table.name == option.name for name in table.feature_names
    ]


def _table(option: ShardingOption, fits: bool) -> dict[str, Any]:
    shards = [
        {
            "rank": shard.rank if fits else None,
            "size": list(shard.size),
            "offset": list(shard.offset),
            **_loads(shard),
            "perf_parts_ms": {part: float(getattr(shard.perf, part, 0.0)) for part in PERF_PARTS},
        }
        for shard in option.shards
    ]
    return {
        "fqn": option.fqn,
        "rows": int(option.tensor.shape[0]),
        "dim": int(option.tensor.shape[1]),
        "weight_bytes": option.tensor.numel() * option.tensor.element_size(),
        "features": _feature_names(option),
        "pooling_factors": [float(length) for length in option.input_lengths],
        "sharding_type": option.sharding_type,
        "compute_kernel": option.compute_kernel,
        **{load: sum(shard[load] for shard in shards) for load in LOADS},
        "shards": shards,
    }


def _rank_loads(
    topology: Topology, reservation: StorageReservation, options: Sequence[ShardingOption]
) -> list[dict[str, Any]]:
    available = reservation.last_reserved_topology or topology
    ranks: list[dict[str, Any]] = [
        {
            "rank": rank,
            **dict.fromkeys(LOADS, 0),
            "num_shards": 0,
            "hbm_available_bytes": device.storage.hbm,
            "ddr_available_bytes": device.storage.ddr,
        }
        for rank, device in enumerate(available.devices)
    ]
    for shard in (shard for option in options for shard in option.shards):
        assert shard.rank is not None
        row = ranks[shard.rank]
        row["num_shards"] += 1
        for load, value in _loads(shard).items():
            row[load] += value
    return ranks


def _imbalance(loads: Sequence[float]) -> float | None:
    total = sum(loads)
    return max(loads) * len(loads) / total if total > 0 else None


def _imbalance_line(imbalance: Mapping[str, float | None]) -> str:
    names = dict(zip(LOADS, ("device memory", "host memory", "time"), strict=True))
    parts = [f"{names[load]} {value:.2f}" for load, value in imbalance.items() if value is not None]
    return "Largest rank over mean: " + ", ".join(parts)


def _shortage(plan: Mapping[str, Any]) -> str:
    weights = sum(table["weight_bytes"] for table in plan["tables"])
    parts = []
    for load, memory in (("hbm", "device"), ("ddr", "host")):
        need = sum(table[f"{load}_bytes"] for table in plan["tables"])
        have = sum(rank[f"{load}_available_bytes"] for rank in plan["ranks"])
        parts.append(f"{format_bytes(need)} of {format_bytes(have)} {memory} memory")
    return (
        f"Nothing fits. The weights alone take {format_bytes(weights)}; with replicas, optimizer, inputs and outputs "
        f"the last attempt took {' and '.join(parts)} left after reservations.\n"
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
                _spans(holders),
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


def _spans(ranks: Sequence[int]) -> str:
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
        alike.setdefault((str(rank["num_shards"]), *memory, f"{rank['perf_ms']:.3g}"), []).append(rank["rank"])
    rows = [["ranks", "shards", "device mem", "host mem", "ms"]]
    rows += [[_spans(sorted(members)), *cells] for cells, members in list(alike.items())[:MAX_RANK_ROWS]]
    hidden = sum(map(len, list(alike.values())[MAX_RANK_ROWS:]))
    return rows + [[f"... and {hidden} faster ranks"]] * (hidden > 0)


def _aligned_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to columns: numbers to the right, words to the left; the last line may be a single remark."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    words = {i for i, name in enumerate(rows[0]) if name in ("table", "sharding", "kernel", "ranks")}
    lines = []
    for row in rows:
        if len(row) < len(rows[0]):
            lines.append(row[0])
            continue
        padded = [row[i].ljust(w) if i in words else row[i].rjust(w) for i, w in enumerate(widths)]
        lines.append("  ".join(padded).rstrip())
    return lines
