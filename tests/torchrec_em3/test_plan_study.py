"""Plans for tables that no data set has: bytes against arithmetic, what does not fit, constraints on single tables."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.plan_budget import token_bytes
from torchrec_em3.plan_shortage import find_shortages
from torchrec_em3.plan_study import DEFAULT_TOKENS, plan_for, planned_schema, study, summary
from torchrec_em3.schema import FeatureSchema
from torchrec_em3.topology import GIB, Cluster, read_cluster

BATCH, HISTORY, DIM = 512, 20, 32


def config(*, content: str = "none", **embeddings: Any) -> Config:
    return resolve_parts(
        Config(
            loader=LoaderConfig(batch_size=BATCH, max_history=HISTORY),
            model=ModelConfig(content=content, embedding_dim=DIM),
            embeddings=EmbeddingConfig(**embeddings),
        )
    )


def tables(plan: dict[str, Any]) -> dict[str, Any]:
    return {table["fqn"].rpartition(".")[2]: table for table in plan["tables"]}


def huge(item: str = "1e10") -> FeatureSchema:
    return planned_schema(f"user=1e9,item={item}", DEFAULT_TOKENS)


@pytest.mark.parametrize(("optimizer", "state_bytes"), [("sgd", 0), ("rowwise_adagrad", 4), ("adagrad", 4 * DIM)])
def test_bytes_of_a_table_on_one_cpu_are_what_arithmetic_says(optimizer: str, state_bytes: int) -> None:
    rows = 1_000_000
    one = Cluster(ddr_gb=64)
    schema = planned_schema(f"user={rows},item={rows}", "")
    plan = plan_for(schema, config(optimizer=optimizer, sharding="table_wise"), one)
    stored = (rows + 1) * (4 * DIM + state_bytes)
    # A pooled feature: one id of 8 bytes and one vector a row of the batch. The item table: every id of target and
    # history, and as many vectors.
    ids = {"user_table": BATCH, "item_table": BATCH * (1 + HISTORY)}
    for name, table in tables(plan).items():
        assert table["weight_bytes"] == (rows + 1) * 4 * DIM
        assert table["hbm_bytes"] == 0
        assert table["ddr_bytes"] == pytest.approx(stored + ids[name] * (8 + 4 * DIM), abs=rows // 1000)


def test_half_precision_halves_the_weights() -> None:
    schema = planned_schema("user=1e6,item=1e6", "")
    single, half = (plan_for(schema, config(precision=p), Cluster(ddr_gb=64)) for p in ("fp32", "fp16"))
    for name, table in tables(half).items():
        assert 2 * table["weight_bytes"] == tables(single)[name]["weight_bytes"]
        assert table["ddr_bytes"] < tables(single)[name]["ddr_bytes"]


def test_ten_billion_rows_are_planned_without_gpu_or_group() -> None:
    cluster = read_cluster("64xH100")
    plan = plan_for(huge(), config(content="concat"), cluster)
    assert plan["fits"]
    item = tables(plan)["item_table"]
    assert item["rows"] == 10**10 + 1
    assert sum(shard["size"][0] for shard in item["shards"]) == item["rows"]
    assert {shard["rank"] for shard in item["shards"]} == set(range(64))
    assert item["hbm_bytes"] + item["ddr_bytes"] > item["weight_bytes"] == item["rows"] * DIM * 4


def test_bank_and_dense_parts_are_taken_off_what_tables_may_use() -> None:
    cluster = read_cluster("64xH100")
    plan = plan_for(huge(), config(content="concat"), cluster)
    budget = plan["budget"]
    assert budget["bank_bytes"] == math.ceil((10**10 + 1) / 64) * (DIM + 1) * 4
    assert budget["bank_total_bytes"] == (10**10 + 1) * (DIM + 1) * 4
    # Weight, gradient, two moments of Adam and the running average, 4 bytes each.
    assert budget["dense_bytes"] == 20 * budget["dense_parameters"] > 0
    available = 0.85 * 80 * GIB - budget["bank_bytes"] - budget["dense_bytes"]
    for rank in plan["ranks"]:
        assert rank["hbm_available_bytes"] == pytest.approx(available, abs=2)
        assert rank["hbm_bytes"] <= rank["hbm_available_bytes"]
        assert rank["ddr_available_bytes"] == pytest.approx(0.85 * 256 * GIB, abs=2)
    most = summary(plan)
    assert (
        most["hbm_bytes"] == max(r["hbm_bytes"] for r in plan["ranks"]) + budget["bank_bytes"] + budget["dense_bytes"]
    )


def test_on_cpu_the_budget_is_host_memory() -> None:
    plan = plan_for(huge("1e9"), config(content="concat"), read_cluster("16xCPU"))
    fixed = plan["budget"]["bank_bytes"] + plan["budget"]["dense_bytes"]
    assert plan["budget"]["bank_bytes"] > 0
    assert all(rank["ddr_available_bytes"] == pytest.approx(0.85 * 512 * GIB - fixed, abs=2) for rank in plan["ranks"])
    without = plan_for(huge("1e9"), config(), read_cluster("16xCPU"))
    assert without["budget"]["bank_bytes"] == without["token_bytes"] == 0


def test_times_are_split_without_rest() -> None:
    plan = plan_for(planned_schema("user=1e8,age=90,item=1e9", ""), config(), read_cluster("8xH200"))
    for rank in [*plan["ranks"], summary(plan)]:
        parts = [rank[key] for key in ("lookup_ms", "communication_ms", "backward_ms")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(rank["perf_ms"])


def test_bytes_of_the_token_store_are_those_on_disk(tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    arrays = list(data.tokens_folder.rglob("*.npy"))
    headers = 128 * len(arrays)
    assert sum(path.stat().st_size for path in arrays) - headers == token_bytes(FeatureSchema.from_meta(data.meta))


def test_what_does_not_fit_names_the_smallest_violation_and_what_would_help() -> None:
    eight = Cluster(name="small", world_size=8, local_world_size=8, device="cuda", hbm_gb=40, ddr_gb=8)
    plan = study(huge("1e9"), config(content="concat"), [eight])[0]
    assert not plan["fits"]
    assert all(
        shortage["over_bytes"] == shortage["need_bytes"] - shortage["have_bytes"] for shortage in plan["shortages"]
    )
    over = [shortage["over_bytes"] for shortage in plan["shortages"]]
    assert over == sorted(over)
    assert over[0] > 0
    remedies = {remedy["name"].split(",")[0]: remedy for remedy in plan["remedies"]}
    assert not any("together" in name for name in remedies), "half precision suffices"
    assert {"UVM caching", "row-wise", "half precision", "no content in histories"} < remedies.keys()
    # Each was planned again: it takes what its own plan says.
    half = plan_for(huge("1e9"), config(content="concat", precision="fp16"), eight)
    assert half["fits"]
    outcome = {key: remedies["half precision"][key] for key in summary(half)}
    assert outcome == summary(half)
    larger = remedies["2 machines" if "2 machines" in remedies else "4 machines"]
    assert larger["fits"]
    assert 0 < larger["hbm_bytes"] <= 40 * GIB


def test_changes_that_do_not_suffice_are_tried_together() -> None:
    wide = dataclasses.replace(config(content="concat"), model=ModelConfig(content="concat", embedding_dim=64))
    remedies = study(huge(), resolve_parts(wide), [read_cluster("8xH100")])[0]["remedies"]
    single, together = remedies[:3], remedies[3]
    assert not any(remedy["fits"] for remedy in single)
    assert together["name"] == "these 3 together"
    assert together["fits"]
    assert together["hbm_bytes"] <= 0.85 * 80 * GIB
    assert together["ddr_bytes"] <= 0.85 * 256 * GIB


@pytest.mark.parametrize("ids", ["hashed", "managed"])
def test_what_is_tried_keeps_the_rows_of_tables_of_raw_ids(ids: str) -> None:
    """Of a user table with 10 billion rows over a vocabulary of a thousand; a rank has room for none of it."""
    small = Cluster(name="small", world_size=2, local_world_size=2, device="cuda", hbm_gb=1, ddr_gb=1)
    of_ids = config(tables={"user_table": {"ids": ids, "rows": 10**10}})
    remedies = {
        remedy["name"].split(",")[0]: remedy
        for remedy in study(planned_schema("user=1e3,item=1e3", ""), of_ids, [small])[0]["remedies"]
    }
    for name in ("UVM caching", "row-wise"):
        assert not remedies[name]["fits"]
        assert "error" not in remedies[name]


def test_a_plan_that_fits_needs_no_remedies() -> None:
    assert study(planned_schema("user=10,item=10", ""), config(), [Cluster()])[0]["remedies"] == []


def test_constraints_on_single_tables_are_kept() -> None:
    schema, cluster = planned_schema("user=1e7,item=1e7", ""), read_cluster("8xH100")
    kept = {"user_table": {"sharding": ["table_wise"]}, "item_table": {"sharding": ["row_wise"]}}
    plan = tables(plan_for(schema, config(tables=kept), cluster))
    assert (plan["user_table"]["sharding_type"], plan["item_table"]["sharding_type"]) == ("table_wise", "row_wise")


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_no_rank_is_left_without_a_row_on_a_cpu(rows: int) -> None:
    """With row 0 there is one more; 6 rows are cut into 2, 2, 2 and none."""
    schema, four = planned_schema(f"user=1000,item=1000,gender={rows}", ""), Cluster(world_size=4, local_world_size=4)
    assert tables(plan_for(schema, config(), four))["gender_table"]["sharding_type"] == "table_wise"
    said = rf"gender_table has {rows + 1} rows, .* all of 4 ranks, .* table_wise in --embeddings.tables.gender_table"
    with pytest.raises(ConfigError, match=said):
        plan_for(schema, config(sharding="row_wise"), four)


def test_rows_that_reach_all_ranks_may_be_sharded_by_row_on_a_cpu() -> None:
    schema, four = planned_schema("user=1000,item=1000,gender=6", ""), Cluster(world_size=4, local_world_size=4)
    plan = tables(plan_for(schema, config(sharding="row_wise"), four))
    assert [shard["size"][0] for shard in plan["gender_table"]["shards"]] == [2, 2, 2, 1]


def test_a_cache_on_the_device_takes_its_share_of_the_rows() -> None:
    schema, cluster = planned_schema("user=1000,item=1e8", ""), read_cluster("8xH100")

    def cached(share: float) -> dict[str, Any]:
        table = {"sharding": ["row_wise"], "kernels": ["fused_uvm_caching"], "cached_share": share}
        return tables(plan_for(schema, config(optimizer="sgd", tables={"item_table": table}), cluster))["item_table"]

    quarter, half = cached(0.25), cached(0.5)
    assert half["ddr_bytes"] == quarter["ddr_bytes"] >= half["weight_bytes"]
    # fbgemm keeps some bytes of its own for each cached row.
    assert half["hbm_bytes"] - quarter["hbm_bytes"] == pytest.approx(0.25 * half["weight_bytes"], rel=0.2)


def test_a_constraint_on_a_table_that_is_not_there_is_refused_by_name() -> None:
    wrong = config(tables={"itm_table": {"sharding": ["row_wise"]}})
    with pytest.raises(ConfigError, match=r"'itm_table'.*tables: user_table, item_table.*Did you mean 'item_table'"):
        plan_for(planned_schema("user=10,item=10", ""), wrong, Cluster())


def test_a_constraint_that_the_device_cannot_keep_is_refused() -> None:
    wrong = config(tables={"item_table": {"kernels": ["fused_uvm_caching"]}})
    with pytest.raises(ConfigError, match="no sharding plan for 1 x cpu"):
        plan_for(planned_schema("user=10,item=10", ""), wrong, Cluster())


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        ("user=1e9", "", "must name `item`"),
        ("item=1e9", "", "must name `item` and at least one user feature"),
        ("user,item=5", "", "NAME=VALUE"),
        ("user=1,item=1,user=2", "", "gives a name twice"),
        ("user=1,item=lots", "", "item=lots must be a number of rows"),
        ("user=1,item=1e13", "", "from 1 to 1e12"),
        ("user=1,item=nan", "", "item=nan must be a number"),
        ("user=1,item=1", "text=384", "NUMBERxWIDTH"),
    ],
)
def test_rows_that_do_not_read_are_refused(rows: str, tokens: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned_schema(rows, tokens)


def test_planned_rows_get_row_0_on_top() -> None:
    schema = planned_schema("user=1e3, item=2e3", "text=32x384")
    assert (schema.user_features[0].rows, schema.item_rows, schema.known_items) == (1001, 2001, 2000)
    assert dataclasses.astuple(schema.modalities[0]) == ("text", 384, 32)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4), st.integers(1, 60))
def test_a_way_is_short_exactly_where_mean_or_largest_shard_exceed_a_rank(
    shards: list[tuple[int, int]], capacity: int
) -> None:
    storages = [SimpleNamespace(storage=SimpleNamespace(hbm=hbm, ddr=ddr)) for hbm, ddr in shards]
    option: Any = SimpleNamespace(fqn="t", sharding_type="row_wise", compute_kernel="fused", shards=storages)
    found = find_shortages([option], {"hbm": capacity, "ddr": capacity}, {"hbm": 3, "ddr": 0}, world_size=2)
    worst = max(
        max(max(column), math.ceil(sum(column) / 2)) + fixed
        for column, fixed in zip(zip(*shards, strict=True), (3, 0), strict=True)
    )
    assert [shortage["over_bytes"] for shortage in found] == ([worst - capacity] if worst > capacity else [])
    free: Any = SimpleNamespace(fqn="t", sharding_type="table_wise", compute_kernel="fused", shards=[])
    assert find_shortages([option, free], {"hbm": capacity + 3}, {"hbm": 3}, world_size=2) == []
