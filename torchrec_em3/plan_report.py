"""What the sharding planner decided: tables, shards and the estimated load of each rank, as JSON and as text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_em3.plan_budget import Budget, BudgetReservation
from torchrec_em3.plan_shortage import find_shortages
from torchrec_em3.plan_text import format_bytes, to_text

__all__ = ["LOADS", "TIMES", "PlanReport", "format_bytes", "to_json", "to_text"]

LOADS = ("hbm_bytes", "ddr_bytes", "perf_ms")
"""Estimates of a shard and of a rank: memory on the device, memory of the host, time of one step."""

MEMORIES = ("hbm", "ddr")

PERF_PARTS = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "prefetch_compute", "input_dist_comms")

TIMES = {
    "lookup_ms": ("fwd_compute", "prefetch_compute"),
    "communication_ms": ("fwd_comms", "bwd_comms"),
    "backward_ms": ("bwd_compute",),
}
"""What a rank's time is made of; the exchange of ids (input_dist_comms) is in no sum, as in TorchRec's own total."""


STATE_BYTES = 4
"""fbgemm keeps the state of the fused optimizers in float32, whatever the precision of the table."""


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
        left = storage_reservation.last_reserved_topology or topology
        ranks = _rank_loads(left, best_plan if fits else [])
        budget = storage_reservation.budget if isinstance(storage_reservation, BudgetReservation) else None
        self._plan = {
            "fits": fits,
            "world_size": topology.world_size,
            "local_world_size": topology.local_world_size,
            "device": topology.compute_device,
            "batch_size": batch_size,
            "planning_seconds": run_time,
            "proposals": num_proposals,
            "plans": num_plans,
            "memory_bytes": {kind: getattr(topology.devices[0].storage, kind) for kind in MEMORIES},
            "budget": budget.as_dict() if budget else None,
            "tables": [_table(option, fits) for option in best_plan],
            "ranks": ranks,
            "imbalance": {load: _imbalance([rank[load] for rank in ranks]) if fits else None for load in LOADS},
            "shortages": [] if fits else _shortages(left, budget, enumerator),
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
            `planning_seconds`, `proposals` tried and `plans` that fitted; `memory_bytes` of a rank ("hbm", "ddr");
            `budget`, `Budget.as_dict()` or None; `tables`, each with `fqn`, `rows`, `dim`, `features`,
            `pooling_factors`, `sharding_type`, `compute_kernel`, `weight_bytes`, the sums of its shards' loads and
            `shards`; `ranks`, each with its loads, the parts of its time (see `TIMES`), `num_shards`, `table_bytes`
            (weights and optimizer state alone, of which a load has inputs and outputs besides) and what it has for
            tables (`hbm_available_bytes`, `ddr_available_bytes`); `imbalance`, the largest rank over the mean by
            load (1 is even, None where there is no load); `shortages` (see `find_shortages`), empty where it fits;
            `torchrec_text`, TorchRec's own statistics. Only `fits`, `tables`, `ranks` and `imbalance` are there before
            any planning.
        """
        return self._plan

    def as_text(self) -> str:
        """Return the plan as a table for a terminal."""
        return to_text(self._plan)


def to_json(plan: Mapping[str, Any]) -> str:
    """Return `PlanReport.as_dict()` as JSON, the content of a run's `plan.json`."""
    return json.dumps(plan, indent=1, allow_nan=False)


def _loads(shard: Shard) -> dict[str, float]:
    storage, perf = shard.storage, shard.perf
    return {
        "hbm_bytes": storage.hbm if storage else 0,
        "ddr_bytes": storage.ddr if storage else 0,
        "perf_ms": float(perf.total) if perf else 0.0,
    }


def _table_bytes(shard: Shard, table: torch.Tensor) -> int:
    """Return the bytes of a shard's weights and of the state that its fused optimizer keeps of them."""
    rows, width = shard.size
    states = {RowWiseAdagrad: 1, torch.optim.Adagrad: width, torch.optim.Adam: 2 * width}
    (optimizer,) = getattr(table, "_optimizer_classes", [None])
    return rows * (width * table.element_size() + STATE_BYTES * states.get(optimizer, 0))


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
            "table_bytes": _table_bytes(shard, option.tensor),
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


def _rank_loads(available: Topology, options: Sequence[ShardingOption]) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = [
        {
            "rank": rank,
            **dict.fromkeys(LOADS, 0),
            **dict.fromkeys(TIMES, 0.0),
            "num_shards": 0,
            "table_bytes": 0,
            "hbm_available_bytes": device.storage.hbm,
            "ddr_available_bytes": device.storage.ddr,
        }
        for rank, device in enumerate(available.devices)
    ]
    for table, shard in ((option.tensor, shard) for option in options for shard in option.shards):
        assert shard.rank is not None
        row = ranks[shard.rank]
        row["num_shards"] += 1
        row["table_bytes"] += _table_bytes(shard, table)
        for load, value in _loads(shard).items():
            row[load] += value
        for time, parts in TIMES.items():
            row[time] += sum(float(getattr(shard.perf, part, 0.0)) for part in parts)
    return ranks


def _shortages(left: Topology, budget: Budget | None, enumerator: Enumerator | None) -> list[dict[str, Any]]:
    fixed = dict.fromkeys(MEMORIES, 0)
    if budget is not None:
        fixed["hbm" if left.compute_device == "cuda" else "ddr"] = budget.fixed_bytes
    available = {kind: getattr(left.devices[0].storage, kind) + fixed[kind] for kind in MEMORIES}
    # The type of the hook is broader than what TorchRec's planner calls it with.
    search_space = getattr(enumerator, "last_stored_search_space", None) or []
    return find_shortages(search_space, available, fixed, left.world_size)


def _imbalance(loads: Sequence[float]) -> float | None:
    total = sum(loads)
    return max(loads) * len(loads) / total if total > 0 else None
