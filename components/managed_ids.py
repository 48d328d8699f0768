"""Tables without a vocabulary: rows for raw 64-bit ids, shared by hashing or given out and taken back by TorchRec.

Shape letters: N ids, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
    _mch_remap,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_em3.components.lookup import Lookup
from torchrec_em3.errors import CheckpointError
from torchrec_em3.schema import IdSpec

__all__ = ["ManagedIds", "hashed_rows", "manage", "managed_rows", "rows_and_owners"]

_POLICIES: Mapping[str, type[MCHEvictionPolicy]] = {
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
    "distance_lfu": DistanceLFU_EvictionPolicy,
}
_FREE = torch.iinfo(torch.int64).max
"""What TorchRec writes in place of an id where a row has none."""


def hashed_rows(id_N: Tensor, rows: int) -> Tensor:
    """Return the row of each id: 0 for id 0, "unknown", else one of the other rows, which ids share.

    Args:
        id_N: Raw ids, int64 and not negative, spread evenly over their range.
        rows: Rows of the table.
    """
    return torch.where(id_N == 0, 0, 1 + id_N % (rows - 1))


class ManagedIds(MCHManagedCollisionModule):
    """TorchRec's map from raw ids to rows, with these differences.

    The row that ids without a row share is the first of a shard, not the last, so that it is row 0 for id 0, "unknown",
    which never gets a row of its own. The map is brought up to date in every training step, and its buffer has the size
    of the step's ids: TorchRec's keeps the size of the first step's, drops what is more, and is not in a checkpoint.
    """

    @property
    def row_bytes(self) -> int:
        """Bytes of the map for each row: its id, the row's number and what the eviction policy knows of it."""
        per_row = self._mch_sorted_raw_ids, self._mch_remapped_ids_mapping, *self._mch_metadata.values()
        return sum(values.element_size() for values in per_row)

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self._mch_remapped_ids_mapping.copy_(self._mch_remapped_ids_mapping.roll(-1))

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """While training, count the ids and give rows to new ones; return `features` as they are."""
        if self.training:
            self._input_history_buffer_size = -1
            known = {name: feature.values()[feature.values() != 0] for name, feature in features.items()}
            super().profile({name: JaggedTensor(id_N, lengths=torch.ones_like(id_N)) for name, id_N in known.items()})
        return features

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """Return the row of each id, the shard's first where it has none."""
        remapped: dict[str, JaggedTensor] = _mch_remap(
            features, self._mch_sorted_raw_ids, self._mch_remapped_ids_mapping, self._output_global_offset
        )
        return remapped

    def validate_state(self) -> None:
        """Take up a map from a checkpoint, which may have had more shards.

        Raises:
            CheckpointError: If a shard of this map is not made of whole shards of the checkpoint's: which rank an id
                belongs to follows from their number.
        """
        try:
            super().validate_state()
        except AssertionError as error:
            shards = int((self._output_segments_tensor >= 0).sum()) - 1
            raise CheckpointError(
                f"a managed table was saved in {shards} shards and cannot be split into other ones; "
                f"use {shards} ranks, or a number that divides it"
            ) from error
        # The first rows of the other shards are free now, and the one that ids without a row share comes last.
        order = torch.argsort((self._mch_remapped_ids_mapping == self._output_global_offset).long(), stable=True)
        free = self._mch_sorted_raw_ids == _FREE
        for metadata in self._mch_metadata.values():
            metadata[free] = 0
        for values in (self._mch_sorted_raw_ids, self._mch_remapped_ids_mapping, *self._mch_metadata.values()):
            values.copy_(values[order])
        self._current_iter = -1  # read from the checkpoint in the next step


def manage(collection: EmbeddingCollection, spec: IdSpec, device: torch.device) -> ManagedCollisionEmbeddingCollection:
    """Return `collection`, of one table, with its rows given to raw ids; its lookups also return the rows."""
    (table,) = collection.embedding_configs()
    # Ids are hashed already, so that equal ranges of them are equally full and ranks get equal shares.
    ids = ManagedIds(
        zch_size=spec.rows,
        device=device,
        eviction_policy=_POLICIES[spec.eviction](),
        eviction_interval=1,
        buckets=spec.rows,
    )
    managed = ManagedCollisionCollection({table.name: ids}, [table], need_preprocess=False)
    return ManagedCollisionEmbeddingCollection(collection, managed, return_remapped_features=True)


def managed_rows(id_N: Tensor, tables: torch.nn.Module) -> Tensor:
    """Return the row of each raw id, 0 where it has none; the map is read, whether in training or not.

    Args:
        id_N: Raw ids.
        tables: A managed collection that this process holds all rows of.
    """
    feature = JaggedTensor(id_N, lengths=torch.ones_like(id_N))
    return _map_of(tables).remap({"id": feature})["id"].values()


def rows_and_owners(lookup: Lookup, tables: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Complete a lookup of a sequence collection.

    Args:
        lookup: Ids that were asked for; id 0 is "unknown".
        tables: The collection, managed or not.

    Returns:
        By feature, the rows [N, D], and which of the ids have a row other than that of "unknown".
    """
    found = lookup.rows()
    names = lookup.features.keys()
    if not isinstance(found, tuple):
        ids = lookup.features.to_dict()
        return {name: (found[name].values(), ids[name].values() > 0) for name in names}
    rows, remapped = found
    rows_a_shard = _map_of(tables).output_size()
    row_of = (remapped.wait() if hasattr(remapped, "wait") else remapped).to_dict()
    return {name: (rows[name].values(), row_of[name].values() % rows_a_shard != 0) for name in names}


def _map_of(tables: torch.nn.Module) -> ManagedIds:
    (mapping,) = (module for module in tables.modules() if isinstance(module, ManagedIds))
    return mapping
