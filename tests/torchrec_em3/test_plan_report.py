import json
import math

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from torchrec_em3.plan_report import PlanReport, format_bytes, to_json, to_text

GIB = 1024**3
DIM = 64
ITEMS = 5_000_000


class Tables(nn.Module):
    def __init__(self, items: int) -> None:
        super().__init__()
        meta = torch.device("meta")
        bags = [EmbeddingBagConfig(name=n, num_embeddings=1000, embedding_dim=DIM, feature_names=[n]) for n in "ab"]
        self.ebc = EmbeddingBagCollection(tables=bags, device=meta)
        item = EmbeddingConfig(
            name="item", num_embeddings=items, embedding_dim=DIM, feature_names=["target", "history"]
        )
        self.ec = EmbeddingCollection(tables=[item], device=meta)


def cluster() -> Topology:
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=64, local_world_size=8),
        HardwareConfig(hbm_cap_bytes=80 * GIB, ddr_cap_bytes=128 * GIB),
        KernelConfig(compute_device="cuda"),
    )


def plan(report: PlanReport, items: int) -> None:
    row_wise = ParameterConstraints(sharding_types=["row_wise"], pooling_factors=[1.0, 50.0])
    small = ParameterConstraints(sharding_types=["table_wise"])
    EmbeddingShardingPlanner(
        topology=cluster(),
        batch_size=4096,
        storage_reservation=FixedPercentageStorageReservation(0.15),
        constraints={"item": row_wise, "a": small, "b": small},
        stats=report.stats,
    ).plan(Tables(items), [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()])


@pytest.fixture(scope="module")
def report() -> PlanReport:
    report = PlanReport()
    plan(report, ITEMS)
    return report


def test_every_shard_of_every_table_is_placed(report):
    got = report.as_dict()
    assert got["fits"]
    assert (got["world_size"], got["local_world_size"], got["device"], got["batch_size"]) == (64, 8, "cuda", 4096)
    tables = {table["fqn"]: table for table in got["tables"]}
    assert set(tables) == {"ebc.a", "ebc.b", "ec.item"}
    item = tables["ec.item"]
    assert (item["rows"], item["dim"], item["sharding_type"]) == (ITEMS, DIM, "row_wise")
    assert item["features"] == ["target", "history"]
    assert item["pooling_factors"] == [1.0, 50.0]
    assert item["weight_bytes"] == ITEMS * DIM * 4
    assert sorted(shard["rank"] for shard in item["shards"]) == list(range(64))
    assert sum(math.prod(shard["size"]) for shard in item["shards"]) == ITEMS * DIM
    assert sum(math.prod(shard["size"]) for shard in tables["ebc.a"]["shards"]) == 1000 * DIM
    for table in tables.values():
        assert table["hbm_bytes"] >= table["weight_bytes"]
        assert all(shard["perf_ms"] > 0 for shard in table["shards"])


def test_rank_totals_are_sums_over_shards(report):
    got = report.as_dict()
    assert [rank["rank"] for rank in got["ranks"]] == list(range(64))
    shards = [shard for table in got["tables"] for shard in table["shards"]]
    for load in ("hbm_bytes", "ddr_bytes", "perf_ms"):
        by_rank = [sum(s[load] for s in shards if s["rank"] == rank) for rank in range(64)]
        assert [rank[load] for rank in got["ranks"]] == pytest.approx(by_rank)
        total = sum(by_rank)
        want = max(by_rank) / (total / 64) if total else None
        assert got["imbalance"][load] == (None if want is None else pytest.approx(want))
    assert sum(rank["num_shards"] for rank in got["ranks"]) == len(shards)
    assert all(rank["hbm_available_bytes"] == pytest.approx(0.85 * 80 * GIB, rel=1e-6) for rank in got["ranks"])


def test_json_round_trip_gives_the_same_text(report):
    text = to_json(report.as_dict())
    assert json.loads(text) == report.as_dict()
    assert to_text(json.loads(text)) == report.as_text()


def test_text_groups_ranks_with_the_same_load(report):
    text = report.as_text()
    assert "64 x cuda on 8 hosts" in text
    for word in ("ec.item", "row_wise", "0-63", "5,000,000", "Largest rank over mean"):
        assert word in text
    assert len(text.splitlines()) < 20
    assert max(map(len, text.splitlines())) <= 120
    assert "Planner Statistics" in report.as_dict()["torchrec_text"]


def test_a_plan_that_does_not_fit_is_reported_too():
    report = PlanReport()
    with pytest.raises(PlannerError):
        plan(report, 500_000_000_000)
    got = report.as_dict()
    assert not got["fits"]
    assert got["imbalance"] == {"hbm_bytes": None, "ddr_bytes": None, "perf_ms": None}
    assert all(rank["hbm_bytes"] == 0 for rank in got["ranks"])
    assert {shard["rank"] for table in got["tables"] for shard in table["shards"]} == {None}
    json.loads(to_json(got))
    assert "Nothing fits" in report.as_text()
    assert format_bytes(500_000_000_000 * DIM * 4)[:3] in report.as_text()
    assert "Largest rank" not in report.as_text()


def test_a_report_that_saw_no_planning_says_so():
    report = PlanReport()
    assert report.as_dict()["tables"] == []
    assert "no tables" in report.as_text()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (10.04 * GIB, "10.0 GiB"),
        (2e18, "1818989 TiB"),
    ],
)
def test_bytes_have_three_digits(count, text):
    assert format_bytes(count) == text
