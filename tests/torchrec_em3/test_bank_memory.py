"""A content bank that is larger than the memory of a rank: two ranks train with it, one says what it lacks."""

import resource
from pathlib import Path

import pytest
import torch

from tests.gang import run_ranks
from tests.torchrec_em3.test_model import SCHEMA, Store, batch
from torchrec_em3.build import this_cluster
from torchrec_em3.config import Config, EmbeddingConfig, ModelConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.model import EM3Model
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.schema import FeatureSchema
from torchrec_em3.sharding import shard

pytestmark = pytest.mark.slow
ITEM_ROWS = 30_000_000
WIDTH = 8
BANK_BYTES = ITEM_ROWS * (WIDTH + 1) * 4
ROOM = BANK_BYTES * 3 // 4
"""What a rank may allocate, for the bank (half of it on two ranks) and all else, which was measured as 3 MiB."""


def data_bytes() -> int:
    """Return what counts against RLIMIT_DATA in this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024


def limit_memory(more: int) -> None:
    """Let this process allocate `more` bytes beyond what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + more, hard))


def train(routing: str) -> list[float]:
    """Train two steps in little memory; return what the bank then holds of items of both halves of the catalogue."""
    load_builtin_parts()
    torch.manual_seed(0)
    schema = FeatureSchema(SCHEMA.user_features, ITEM_ROWS, SCHEMA.known_items, SCHEMA.modalities)
    model = ModelConfig(embedding_dim=WIDTH, ranker_options={"hidden": (8,)}, routing=routing)  # type: ignore[arg-type]
    config = Config(model=model, embeddings=EmbeddingConfig(sharding="table_wise"))
    with process_group() as ranks:
        em3 = EM3Model(schema, config, Store())
        limit_memory(ROOM)
        sharded = shard(em3, config, ranks, this_cluster(ranks))
        items = [[1, 2, ITEM_ROWS - 1], [3, ITEM_ROWS - 2, ITEM_ROWS // 2]][ranks.rank]
        for _ in range(2):
            sharded.optimizer.zero_grad()
            loss, _ = sharded.module(batch(items, [[1, ITEM_ROWS - 1], [], [2]]))
            loss.backward()
            sharded.optimizer.step()
        bank = sharded.model.content.bank  # type: ignore[union-attr]
        _, step_V = bank.read(torch.tensor([1, ITEM_ROWS - 2, 5]))
        return step_V.tolist()


@pytest.mark.parametrize("routing", ["local", "owner"])
def test_two_ranks_train_with_a_bank_that_is_too_large_for_either(routing: str) -> None:
    assert run_ranks(2, train, routing) == [[2.0, 2.0, 0.0]] * 2


def refuse() -> str:
    """Return the error of one rank."""
    with pytest.raises(ConfigError) as error:
        train("local")
    return str(error.value)


def test_one_rank_says_what_it_lacks() -> None:
    said = run_ranks(1, refuse)[0]
    assert said.startswith("no memory on a rank for its shards of tables and content bank; the bank takes 1.0")
    assert "start more ranks" in said
