"""Sharding of managed tables: TorchRec's, with rows that change hands reset on every device."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

__all__ = ["ManagedSharder"]


class _ShardedManagedTables(ShardedManagedCollisionEmbeddingCollection):
    """TorchRec resets rows by an operator that has no CPU kernel and knows row-wise Adagrad only."""

    @torch.no_grad()
    def _evict(self, evictions_per_table: Mapping[str, Tensor | None]) -> None:
        """Initialise the rows anew that got another id, and forget what the optimizer had learned of them."""
        for name, rows in evictions_per_table.items():
            if rows is None or not rows.numel():
                continue
            kernel, place = self._table_to_tbe_and_index[name]
            weights = kernel.split_embedding_weights()[int(place)]
            init = self._embedding_module._table_name_to_config[name].init_fn
            weights[rows] = init(weights[rows])
            states = kernel.split_optimizer_states()  # empty under SGD
            for state in states[int(place)] if states else ():
                state[rows] = 0


class ManagedSharder(ManagedCollisionEmbeddingCollectionSharder):
    """Shards managed tables by rows, which is the only way TorchRec has for them."""

    def shard(
        self,
        module: ManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollisionEmbeddingCollection:
        """Shard the table and the map from ids to its rows alike."""
        assert device is not None, "DistributedModelParallel names the device"
        return _ShardedManagedTables(
            module, params, ec_sharder=self._e_sharder, mc_sharder=self._mc_sharder, env=env, device=device
        )
