"""What a rank holds besides its tables: content bank, dense parameters and room for activations; tokens lie on disk."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder

from torchrec_em3.components.content_bank import ContentBank
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
        reserved_share: Share of both memories that is left to everything else.
    """

    bank_bytes: int
    bank_total_bytes: int
    dense_parameters: int
    dense_bytes: int
    reserved_share: float = RESERVED_SHARE

    @property
    def fixed_bytes(self) -> int:
        """What is taken off a rank's memory in bytes, whatever memory it has."""
        return self.bank_bytes + self.dense_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name, and their sum as `fixed_bytes`."""
        return {**asdict(self), "fixed_bytes": self.fixed_bytes}


def model_budget(model: nn.Module, world_size: int) -> Budget:
    """Count what a model needs besides its tables when its bank is sharded by row over `world_size` ranks."""
    banks = [module.pool for module in model.modules() if isinstance(module, ContentBank)]
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if ".tables." not in name)
    return Budget(
        bank_bytes=sum(-(-pool.pool_size // world_size) * pool.dim * FLOAT_BYTES for pool in banks),
        bank_total_bytes=sum(pool.pool_size * pool.dim * FLOAT_BYTES for pool in banks),
        dense_parameters=dense,
        dense_bytes=dense * DENSE_COPIES * FLOAT_BYTES,
    )


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
