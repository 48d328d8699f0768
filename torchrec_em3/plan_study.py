"""Plans of one config for several clusters, and what would make it fit where it does not."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.config import NONE, Config
from torchrec_em3.encoder_suffixes import EncoderSuffixes
from torchrec_em3.errors import ConfigError
from torchrec_em3.model import EM3Model
from torchrec_em3.plan_budget import token_bytes
from torchrec_em3.plan_report import LOADS, TIMES
from torchrec_em3.schema import FeatureSchema, ModalitySpec, SparseFeature
from torchrec_em3.sharding import estimate
from torchrec_em3.topology import Cluster

__all__ = ["DEFAULT_TOKENS", "plan_for", "planned_schema", "study", "summary"]

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = "image=16x128,text=32x128"
"""Tokens of an item as `em3 prepare` stores them unless told otherwise."""
SMALL_CACHE = 0.05
"""Share of the rows that the UVM caching option keeps on the device."""
MIN_DIM = 8


_Lever = tuple[str, str, dict[str, dict[str, Any]]]
"""A change that can be made with others: name, what to set, and fields by section of the config."""
_Planner = Callable[[Config, Cluster], dict[str, Any]]


class _NoTokens:
    """A token store for a model that is planned and never run."""

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ModalityTokens]:
        raise RuntimeError("a model that was built for planning has no tokens")


class _Change(NamedTuple):
    """Something that could make tables fit: its name, what to set, and what then is planned."""

    name: str
    options: str
    config: Config
    cluster: Cluster


def planned_schema(rows: str, tokens: str) -> FeatureSchema:
    """Describe a data set that need not exist.

    Args:
        rows: Rows by table, "user=1e9,item=1e10": `item` and the user features. Row 0 comes on top, as in real data.
        tokens: Tokens of an item by modality, "image=16x128,text=32x128": number and width; empty without content.

    Raises:
        ConfigError: If either does not read so, or `item` is missing.
    """
    counts = {name: _row_count(name, value) for name, value in _pairs("rows", rows)}
    items = counts.pop("item", None)
    if items is None or not counts:
        raise ConfigError(
            f"--rows {rows} must name `item` and at least one user feature, for example user=1e9,item=1e8"
        )
    return FeatureSchema(
        user_features=tuple(SparseFeature(name, count + 1) for name, count in counts.items()),
        item_rows=items + 1,
        known_items=items,
        modalities=tuple(_modality(name, value) for name, value in sorted(_pairs("tokens", tokens))),
    )


def plan_for(
    schema: FeatureSchema, config: Config, cluster: Cluster, encoders: EncoderSuffixes | None = None
) -> dict[str, Any]:
    """Return the plan of a config for a cluster, as `PlanReport.as_dict()` with `cluster` and `token_bytes` besides.

    Args:
        schema: The tables, and the tokens as they are stored.
        config: The run's options.
        cluster: The machines.
        encoders: What turns stored rows into tokens, which every rank holds; None if tokens are stored.
    """
    torch.manual_seed(config.seed)
    read = schema if encoders is None else encoders.read_schema(schema)
    model = EM3Model(read, config, _NoTokens() if config.uses_content else None, encoders=encoders)
    plan = estimate(model, config, cluster).as_dict()
    return {
        "cluster": {**dataclasses.asdict(cluster), "label": cluster.label},
        **plan,
        "token_bytes": token_bytes(schema) if config.uses_content else 0,
    }


def study(
    schema: FeatureSchema, config: Config, clusters: list[Cluster], encoders: EncoderSuffixes | None = None
) -> list[dict[str, Any]]:
    """Plan for each cluster; where nothing fits, plan again with each change that could help.

    Args:
        schema: The tables.
        config: The run's options.
        clusters: The machines, none of which need exist.
        encoders: As for `plan_for`.

    Returns:
        A plan for each cluster (see `plan_for`) with `remedies`, empty where it fits; each has `name`, `options` (what
        to set), and either `error` or what `summary` returns.
    """
    plans = []
    for cluster in clusters:
        logger.info("planning for %s", cluster.label)
        plan = plan_for(schema, config, cluster, encoders)
        again = functools.partial(plan_for, schema, encoders=encoders)
        levers = _levers(schema, config, cluster, has_bank=plan["budget"]["bank_bytes"] > 0)
        plans.append({**plan, "remedies": [] if plan["fits"] else list(_remedies(config, cluster, levers, again))})
    return plans


def summary(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan in a few numbers.

    Returns:
        `fits`; `shardings`, every type and kernel in use; `hbm_bytes` and `ddr_bytes` of the fullest rank, bank and
        dense parts included; `perf_ms` and its parts of the slowest rank; `over_bytes`, what a rank lacks at least, and
        `memory`, of which kind.
    """
    nearest = plan["shortages"][0] if plan["shortages"] else {"over_bytes": 0, "memory": ""}
    most: dict[str, float] = dict.fromkeys((*LOADS, *TIMES), 0)
    if plan["fits"]:
        ranks, budget = plan["ranks"], plan["budget"]
        slowest = max(ranks, key=lambda rank: rank["perf_ms"])
        most = {load: max(rank[load] for rank in ranks) for load in LOADS} | {time: slowest[time] for time in TIMES}
        most["hbm_bytes" if plan["device"] == "cuda" else "ddr_bytes"] += budget["fixed_bytes"]
    kinds = {f"{table['sharding_type']}, {table['compute_kernel']}" for table in plan["tables"]}
    return {
        "fits": plan["fits"],
        "shardings": sorted(kinds),
        **most,
        "over_bytes": nearest["over_bytes"],
        "memory": nearest["memory"],
    }


def _remedies(config: Config, cluster: Cluster, levers: list[_Lever], plan: _Planner) -> Iterator[dict[str, Any]]:
    helped = False
    for name, options, changes in levers:
        remedy = _try(plan, [_Change(name, options, _changed(config, changes), cluster)])
        helped = helped or remedy["fits"]
        yield remedy
    if not helped and len(levers) > 1:
        together = functools.reduce(_changed, (changes for *_, changes in levers), config)
        yield _try(plan, [_Change(f"these {len(levers)} together", "all of the above", together, cluster)])
    for group in _larger_changes(config, cluster):
        yield _try(plan, group)


def _try(plan: _Planner, changes: list[_Change]) -> dict[str, Any]:
    """Plan with each change in turn until one fits; return the remedy that the last one is."""
    outcome: dict[str, Any] = {"fits": False}
    for change in changes:
        logger.info("too small; trying: %s", change.name)
        try:
            outcome = summary(plan(change.config, change.cluster))
        except ConfigError as error:
            outcome = {"fits": False, "error": str(error)}
        if outcome["fits"]:
            break
    return {"name": change.name, "options": change.options, **outcome}


def _larger_changes(config: Config, cluster: Cluster) -> Iterator[list[_Change]]:
    """Yield changes that stand alone, each with larger forms of itself."""
    if config.embeddings.sharding != "row_wise" or config.embeddings.tables:
        tables = {name: _as_ids_are(own, {}) for name, own in config.embeddings.tables.items()}
        by_row = _changed(config, {"embeddings": {"sharding": "row_wise", "tables": tables}})
        yield [_Change("row-wise, every table", "--embeddings.sharding row_wise", by_row, cluster)]
    dims = [config.model.embedding_dim // divisor for divisor in (2, 4, 8)]
    smaller = [
        _Change(f"dimension {dim}", f"--model.embedding_dim {dim}", _changed(config, {"model": change}), cluster)
        for dim, change in ((dim, {"embedding_dim": dim}) for dim in dims if dim >= MIN_DIM and dim % 4 == 0)
    ]
    if smaller:
        yield smaller
    larger = [dataclasses.replace(cluster, name="", world_size=n * cluster.world_size) for n in (2, 4, 8, 16)]
    yield [_Change(f"{more.num_hosts} machines", f"world_size: {more.world_size}", config, more) for more in larger]


def _levers(schema: FeatureSchema, config: Config, cluster: Cluster, *, has_bank: bool) -> list[_Lever]:
    """Return the changes that can be made together."""
    levers: list[_Lever] = []
    if cluster.device == "cuda":
        cached = {"sharding": ["row_wise"], "kernels": ["fused_uvm_caching"], "cached_share": SMALL_CACHE}
        tables = [f"{feature.name}_table" for feature in schema.pooled_features] + ["item_table"]
        options = f"embeddings.tables: for each table row_wise, fused_uvm_caching, cached_share {SMALL_CACHE}"
        name = f"UVM caching, {100 * SMALL_CACHE:.0f}% of the rows on the device"
        known = config.embeddings.tables
        changed = {table: _as_ids_are(known.get(table, {}), cached) for table in tables}
        levers.append((name, options, {"embeddings": {"tables": changed}}))
    if config.embeddings.precision == "fp32":
        levers.append(("half precision", "--embeddings.precision fp16", {"embeddings": {"precision": "fp16"}}))
    if has_bank:
        without = {"model": {"history": NONE, "history_options": {}, "encode_fraction": 1.0}}
        options = "--model.history none --model.encode_fraction 1"
        levers.append(("no content in histories, so no bank", options, without))
    return levers


def _as_ids_are(own: Mapping[str, Any], constraints: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table's options with other constraints, and with its kind of ids, which says how many rows it has.

    A table of managed ids is row-wise and fused whatever is tried.
    """
    kept = {name: own[name] for name in ("ids", "rows", "eviction") if name in own}
    return kept if kept.get("ids") == "managed" else {**kept, **constraints}


def _changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the config with some fields of its sections replaced."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(config, **sections)


def _pairs(option: str, text: str) -> list[tuple[str, str]]:
    pairs = [tuple(part.partition("=")[::2]) for part in text.split(",") if part.strip()]
    for name, value in pairs:
        if not name.strip() or not value.strip():
            raise ConfigError(f"--{option} {text} must be NAME=VALUE with commas between")
    if len({name.strip() for name, _ in pairs}) < len(pairs):
        raise ConfigError(f"--{option} {text} gives a name twice")
    return [(name.strip(), value.strip()) for name, value in pairs]


def _row_count(name: str, value: str) -> int:
    try:
        count = float(value)
    except ValueError:
        count = 0.0
    if not 1 <= count <= 1e12:
        raise ConfigError(f"--rows {name}={value} must be a number of rows from 1 to 1e12, for example 1e9")
    return int(count)


def _modality(name: str, value: str) -> ModalitySpec:
    count, _, width = value.partition("x")
    if not (count.isdigit() and width.isdigit() and int(count) and int(width)):
        raise ConfigError(f"--tokens {name}={value} must be NUMBERxWIDTH, for example 32x128")
    return ModalitySpec(name, dim=int(width), max_tokens=int(count))
