"""The stream of batches that a run's options ask for, the same for training, evaluation, profiles and shards."""

from torchrec_em3.config import Config
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.datasets.recent_events import ShardRows
from torchrec_em3.id_tables import USER_TABLE, uses_raw_ids
from torchrec_em3.process_group import Ranks

__all__ = ["open_stream"]


def open_stream(config: Config, data: PreparedData | ShardRows, split: Split, ranks: Ranks) -> BatchStream:
    """Return this rank's stream over a split.

    Raises:
        ConfigError: If rows are shuffled by strata and a step is no multiple of them.
        DataError: If the split is damaged, or the training split is smaller than one global batch.
    """
    return BatchStream(
        data,
        split,
        batch_size=config.loader.batch_size,
        max_history=config.loader.max_history,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        shuffle=config.loader.shuffle,
        raw_users=uses_raw_ids(config.embeddings, USER_TABLE),
    )
