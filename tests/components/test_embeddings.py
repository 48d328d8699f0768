"""The ID path: features keep their places whatever the sharding plan, distinct ids are looked up once."""

import pytest
import torch
from torch import Tensor
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.gang import Gang
from torchrec_em3.components.embeddings import ItemEmbedding, UserEmbedding
from torchrec_em3.schema import FeatureSchema, SparseFeature

NAMES = ("user", "age", "region", "device")
FEATURES = tuple(SparseFeature(name, 4) for name in NAMES)
SCHEMA = FeatureSchema(user_features=FEATURES, item_rows=8, known_items=5)


def pooled_on_ranks(places: tuple[int, ...]) -> list[float]:
    """Shard the tables as `places` say, fill the k-th with k; return which table each feature came from."""
    users = UserEmbedding(SCHEMA, 4, torch.device("meta"))
    _apply_optimizer_in_backward(torch.optim.SGD, users.tables.parameters(), {"lr": 0.0})
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        users.tables,
        {f"{name}_table": table_wise(rank=rank) for name, rank in zip(NAMES, places, strict=True)},
        sharder,  # type: ignore[arg-type]
        local_size=2,
        world_size=2,
        device_type="cpu",
    )
    module = DistributedModelParallel(
        users,
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan}),
        sharders=[sharder],  # type: ignore[list-item]
    )
    for name, value in module.state_dict().items():
        for shard in value.local_shards():
            shard.tensor.data.fill_(float(NAMES.index(name.split(".")[-2].removesuffix("_table"))))
    features = KeyedJaggedTensor(
        keys=list(NAMES), values=torch.ones(8, dtype=torch.int64), lengths=torch.ones(8, dtype=torch.int64)
    )
    pooled: dict[str, Tensor] = module(features)
    return [float(pooled[name][0, 0]) for name in NAMES]


@pytest.mark.slow
def test_features_keep_their_tables_under_every_plan() -> None:
    with Gang(2) as gang:
        for places in ((0, 0, 1, 1), (1, 0, 1, 0), (1, 1, 0, 0), (0, 1, 0, 1)):
            assert gang.run(pooled_on_ranks, places) == [[0.0, 1.0, 2.0, 3.0]] * 2, places


def test_items_look_up_distinct_rows_and_unknown_ones_share_row_zero() -> None:
    items = ItemEmbedding(SCHEMA, 4, torch.device("cpu"))
    table = items.tables.embeddings["item_table"].weight
    target_UD, history_VD, unknown_D, known_U = items(torch.tensor([2, 6, 7]), torch.tensor([5, 0]))
    assert torch.equal(target_UD, table[[2, 0, 0]])
    assert torch.equal(history_VD, table[[5, 0]])
    assert torch.equal(unknown_D, table[0])
    assert known_U.tolist() == [True, False, False]


def test_items_without_any_history() -> None:
    items = ItemEmbedding(SCHEMA, 4, torch.device("cpu"))
    target_UD, history_VD, *_ = items(torch.tensor([1]), torch.empty(0, dtype=torch.int64))
    assert target_UD.shape == (1, 4)
    assert history_VD.shape == (0, 4)
