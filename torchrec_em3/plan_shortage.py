"""Why nothing fits: for every way to shard the tables, the memory that it lacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchrec.distributed.planner.types import ShardingOption

__all__ = ["find_shortages"]


def find_shortages(
    search_space: Sequence[ShardingOption], capacity: Mapping[str, int], fixed: Mapping[str, int], world_size: int
) -> list[dict[str, Any]]:
    """Return what each way to shard lacks, the way nearest to fitting first.

    A way is one sharding type and one kernel for every table that allows them; another table keeps the option that
    takes the least device memory. Each way is judged by the constraint that it violates by most.

    Args:
        search_space: Every option of every table that the constraints allow.
        capacity: Bytes of one rank for tables, bank and dense parts, by kind of memory ("hbm", "ddr").
        fixed: Those of them that bank and dense parts take.
        world_size: Number of ranks.

    Returns:
        For each way: `sharding_type`, `compute_kernel`, `memory` ("hbm" or "ddr"), `scope`
        ("mean", what all tables need over the number of ranks, or "largest shard") and the bytes of a rank that it
        needs, has and lacks: `need_bytes`, `have_bytes`, `over_bytes`. Empty if a way fits by these measures, so that
        only packing its shards into ranks failed.
    """
    by_table: dict[str, list[ShardingOption]] = {}
    for option in search_space:
        by_table.setdefault(option.fqn, []).append(option)
    shortages: list[dict[str, Any]] = []
    for sharding_type, kernel in sorted({(option.sharding_type, option.compute_kernel) for option in search_space}):
        chosen = [_choose(options, sharding_type, kernel) for options in by_table.values()]
        violated = [
            {"sharding_type": sharding_type, "compute_kernel": kernel, "memory": memory, **violation}
            for memory in capacity
            for violation in _violations(chosen, memory, capacity[memory], fixed[memory], world_size)
        ]
        if not violated:
            return []
        shortages.append(max(violated, key=lambda violation: violation["over_bytes"]))
    return sorted(shortages, key=lambda shortage: shortage["over_bytes"])


def _choose(options: Sequence[ShardingOption], sharding_type: str, kernel: str) -> ShardingOption:
    asked = [o for o in options if o.sharding_type == sharding_type and o.compute_kernel == kernel]
    return min(asked or options, key=lambda option: _total(option, "hbm"))


def _violations(
    options: Sequence[ShardingOption], memory: str, capacity: int, fixed: int, world_size: int
) -> list[dict[str, Any]]:
    shards = [_bytes(shard.storage, memory) for option in options for shard in option.shards]
    needs = {"mean": -(-sum(shards) // world_size), "largest shard": max(shards, default=0)}
    return [
        {
            "scope": scope,
            "need_bytes": need + fixed,
            "have_bytes": capacity,
            "over_bytes": need + fixed - capacity,
        }
        for scope, need in needs.items()
        if need + fixed > capacity
    ]


def _total(option: ShardingOption, memory: str) -> int:
    return sum(_bytes(shard.storage, memory) for shard in option.shards)


def _bytes(storage: Any, memory: str) -> int:
    return int(getattr(storage, memory)) if storage else 0
