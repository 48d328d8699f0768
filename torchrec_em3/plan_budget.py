"""What a rank holds besides its tables: bank, dense parameters, encoders, maps of ids and room for activations."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder

from torchrec_em3.components.content_bank import ContentBank
from torchrec_em3.components.embeddings import ItemEmbedding
from torchrec_em3.components.managed_ids import ManagedIds
from torchrec_em3.encoder_suffixes import EncoderSuffixes
from torchrec_em3.schema import FeatureSchema

__all__ = ["Budget", "BudgetReservation", "model_budget", "token_bytes"]

RESERVED_SHARE = 0.15
"""Share of each rank's memory that the plan leaves to activations, buffers of exchanges and the allocator."""
DENSE_COPIES = 5
"""Float32 numbers a dense parameter: weight, gradient, Adam's two moments and the running average of the weight."""
FLOAT_BYTES = 4
TOKEN_BYTES = 2
TOKEN_ROW_BYTES = 5
"""Besides its tokens a row of the store has a length (int32) and a flag (bool)."""
CODE_BYTES = 4
CODE_ROW_BYTES = 1
"""Besides its codes a row of the store has a flag (bool)."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory of each rank that is not for tables, where the rank computes: device memory on CUDA, else host memory.

    Attributes:
        bank_bytes: The largest share of the content bank that a rank holds; 0 without one.
        bank_total_bytes: The whole bank, over all ranks.
        dense_parameters: Parameters that every rank has a copy of.
        dense_bytes: They, their gradients, Adam's state and their running average.
        encoder_parameters: Parameters of the encoders' layers above the cuts of the token store, on every rank as well.
        encoder_bytes: They, and gradients, Adam's state and running average of those that are trained.
        id_map_bytes: The largest share that a rank holds of the maps from raw ids to rows of managed tables, and the
            raw ids of the catalogue, which every rank has where the item table is looked up by them.
        reserved_share: Share of both memories that is left to everything else.
    """

    bank_bytes: int
    bank_total_bytes: int
    dense_parameters: int
    dense_bytes: int
    encoder_parameters: int
    encoder_bytes: int
    id_map_bytes: int
    reserved_share: float = RESERVED_SHARE

    @property
    def fixed_bytes(self) -> int:
        """What is taken off a rank's memory in bytes, whatever memory it has."""
        return self.bank_bytes + self.dense_bytes + self.encoder_bytes + self.id_map_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name, and their sum as `fixed_bytes`."""
        return {**asdict(self), "fixed_bytes": self.fixed_bytes}


def model_budget(model: nn.Module, world_size: int) -> Budget:
    """Count what a model needs besides its tables when its bank is sharded by row over `world_size` ranks."""
    banks = [module.pool for module in model.modules() if isinstance(module, ContentBank)]
    suffixes = [module for module in model.modules() if isinstance(module, EncoderSuffixes)]
    encoders = [weight for suffix in suffixes for weight in suffix.parameters()]
    parameters = sum(weight.numel() for name, weight in model.named_parameters() if ".tables." not in name)
    dense = parameters - sum(weight.numel() for weight in encoders)
    return Budget(
        bank_bytes=sum(-(-pool.pool_size // world_size) * pool.dim * FLOAT_BYTES for pool in banks),
        bank_total_bytes=sum(pool.pool_size * pool.dim * FLOAT_BYTES for pool in banks),
        dense_parameters=dense,
        dense_bytes=dense * DENSE_COPIES * FLOAT_BYTES,
        encoder_parameters=sum(weight.numel() for weight in encoders),
        encoder_bytes=sum(weight.nbytes * (DENSE_COPIES if weight.requires_grad else 1) for weight in encoders),
        id_map_bytes=_id_map_bytes(model, world_size),
    )


def _id_map_bytes(model: nn.Module, world_size: int) -> int:
    maps = sum(
        -(-module.output_size() // world_size) * module.row_bytes
        for module in model.modules()
        if isinstance(module, ManagedIds)
    )
    return maps + sum(module.raw_id_bytes for module in model.modules() if isinstance(module, ItemEmbedding))


def token_bytes(schema: FeatureSchema) -> int:
    """Return the size of tokens and codes on disk; they are memory-mapped and take no memory that others could need."""
    row = sum(modality.max_tokens * modality.dim * TOKEN_BYTES + TOKEN_ROW_BYTES for modality in schema.modalities)
    row += sum(code.levels * CODE_BYTES + CODE_ROW_BYTES for code in schema.codes)
    return schema.item_rows * row


class BudgetReservation(FixedPercentageStorageReservation):
    """Takes the budget off each rank's memory before the planner places tables.

    TorchRec's own reservations know neither the content bank nor host memory. What is left may be negative; then
    nothing fits.
    """

    def __init__(self, budget: Budget) -> None:
        """Reserve `budget` on each rank."""
        super().__init__(budget.reserved_share)
        self.budget = budget

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: Mapping[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """Return `topology` with what is left for tables."""
        left = super().reserve(topology, batch_size, module, sharders, dict(constraints or {}))
        fixed = self.budget.fixed_bytes
        for device in left.devices:
            device.storage.ddr = int((1 - self.budget.reserved_share) * device.storage.ddr)
            if topology.compute_device == "cuda":
                device.storage.hbm -= fixed
            else:
                device.storage.ddr -= fixed
        self._last_reserved_topology = left
        return left
