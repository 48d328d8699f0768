"""Sharding: the planner's topology and constraints, fused optimizers, DistributedModelParallel.

Only this module knows DistributedModelParallel; one process is a world of one and runs the same code.
"""

import os
import shutil
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.planners import PlannerError
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.tensor_pool import TensorPoolSharder
from torchrec.distributed.types import (
    CacheParams,
    ModuleSharder,
    ObjectPoolShardingPlan,
    ObjectPoolShardingType,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.tensor_pool import TensorPool
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_em3.components.embeddings import ItemEmbedding, UserEmbedding, UserIdEmbedding
from torchrec_em3.config import Config, EmbeddingConfig, TrainConfig
from torchrec_em3.encoder_suffixes import EncoderSuffixes
from torchrec_em3.errors import ConfigError
from torchrec_em3.id_tables import table_options
from torchrec_em3.managed_sharding import ManagedSharder
from torchrec_em3.model import EM3Model
from torchrec_em3.plan_budget import BudgetReservation, model_budget
from torchrec_em3.plan_report import PlanReport
from torchrec_em3.process_group import Ranks
from torchrec_em3.registry import closest
from torchrec_em3.shard_memory import check_bank_split, room_for_shards
from torchrec_em3.topology import Cluster
from torchrec_em3.weight_average import WeightAverage

__all__ = ["Cluster", "ShardedModel", "estimate", "make_plan", "shard"]

ADAGRAD_EPSILON = 1e-8
"""Given explicitly: fbgemm's default and the eager optimizer's differ, and with them the weights."""
GRID_SHARDS = 10_000
"""The planner tries all combinations of the tables' options if they, times the ranks, are at most this many, which is
TorchRec's limit at one rank; otherwise it searches greedily, which takes seconds in place of minutes."""
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}
_AUTO = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)
"""What the planner may choose from by itself. Under column-wise sharding row-wise Adagrad keeps a state for each column
shard, so results would depend on the number of ranks."""


class _CpuBagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder offers only table-wise and column-wise on CPU, though row-wise works there as well."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*_AUTO, ShardingType.COLUMN_WISE.value]


class _CpuSequenceSharder(EmbeddingCollectionSharder):
    """As above, for sequence embeddings."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*_AUTO, ShardingType.COLUMN_WISE.value]


def _sharders(device: str) -> list[ModuleSharder[nn.Module]]:
    if device == "cpu":
        return [_CpuBagSharder(), _CpuSequenceSharder(), ManagedSharder(_CpuSequenceSharder()), TensorPoolSharder()]
    return [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(), ManagedSharder(), TensorPoolSharder()]


def _constraints(model: EM3Model, config: Config, cluster: Cluster) -> dict[str, ParameterConstraints]:
    """Say for each table how it may be sharded and how many ids a row brings, which the planner cannot know.

    Data parallel is never offered: such a table ignores the fused optimizer, and its sequence form fails on CPU.
    """
    asked = config.embeddings.sharding
    types = list(_AUTO) if asked == "auto" else [asked]
    kernels = [EmbeddingComputeKernel.FUSED.value]
    if cluster.device == "cuda":
        kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
    single = config.embeddings.tables
    history = float(config.loader.max_history)
    rows = {name.split(".")[-2]: len(table) for name, table in model.named_parameters() if ".tables." in name}
    constraints = {}
    for module in model.modules():
        if isinstance(module, UserEmbedding | UserIdEmbedding | ItemEmbedding):
            pooling = [1.0, history] if isinstance(module, ItemEmbedding) else [1.0]
            for name in module.table_names:
                table = table_options(config.embeddings, name)
                managed = table.ids == "managed"
                if managed and table.rows % cluster.world_size:
                    raise ConfigError(
                        f"--embeddings.tables.{name}: rows is {table.rows}, must be a multiple of the "
                        f"{cluster.world_size} ranks"
                    )
                constraints[name] = ParameterConstraints(
                    sharding_types=(
                        [ShardingType.ROW_WISE.value]
                        if managed
                        else _suitable(list(table.sharding) or types, name, rows[name], cluster)
                    ),
                    compute_kernels=kernels[:1] if managed else list(table.kernels) or kernels,
                    pooling_factors=pooling,
                    cache_params=None if table.cached_share is None else CacheParams(load_factor=table.cached_share),
                )
    for name in single.keys() - constraints.keys():
        raise ConfigError(
            f"--embeddings.tables names '{name}', which the model does not have; "
            f"tables: {', '.join(constraints)}.{closest(name, list(constraints))}"
        )
    return constraints


def _suitable(types: list[str], name: str, rows: int, cluster: Cluster) -> list[str]:
    """Leave out row-wise on a CPU where a rank would have no row of the table.

    fbgemm's CPU kernel looks for the size of a shard without rows beyond the end of its list of sizes; it depends on
    what lies there in memory whether it fails ("more than 2B rows").
    """
    block = -(-rows // cluster.world_size)
    if cluster.device != "cpu" or block * (cluster.world_size - 1) < rows:
        return types
    suitable = [kind for kind in types if kind != ShardingType.ROW_WISE.value]
    if not suitable:
        raise ConfigError(
            f"{name} has {rows} rows, which row_wise cuts into blocks of {block} that do not reach all of "
            f"{cluster.world_size} ranks, as they must on a CPU; name table_wise in --embeddings.tables.{name}.sharding"
        )
    return suitable


def _planner(model: EM3Model, config: Config, cluster: Cluster, report: PlanReport) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=cluster.topology(),
        batch_size=config.loader.batch_size,
        constraints=_constraints(model, config, cluster),
        storage_reservation=BudgetReservation(model_budget(model, cluster.world_size)),
        proposer=[
            GridSearchProposer(max_proposals=GRID_SHARDS // cluster.world_size),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        stats=report.stats,
    )


def estimate(model: EM3Model, config: Config, cluster: Cluster) -> PlanReport:
    """Plan for machines that need not exist, without a process group; the report may say that nothing fits.

    Args:
        model: The model, tables on meta and not fused yet: the state of their optimizer counts.
        config: The run's options.
        cluster: The machines.

    Raises:
        ConfigError: If a table's constraints leave no way to shard it, or the optimizer does not run on the device.
    """
    check_bank_split(model, cluster.world_size)
    report = PlanReport()
    _fuse_optimizers(model, config.embeddings, torch.device(cluster.device))
    try:
        _planner(model, config, cluster, report).plan(model, _sharders(cluster.device))
    except PlannerError as error:
        if report.as_dict()["fits"]:
            raise _no_plan(config, cluster, error) from error
    except RuntimeError as error:
        raise _no_plan(config, cluster, error) from error
    return report


def make_plan(model: EM3Model, config: Config, cluster: Cluster, ranks: Ranks) -> tuple[ShardingPlan, PlanReport]:
    """Let TorchRec's planner place the tables, and add the content bank, which the planner does not know. Collective.

    Args:
        model: The model, tables on meta.
        config: The run's options.
        cluster: The machines that run this job.
        ranks: This process among its peers; all receive rank 0's plan.

    Returns:
        The plan and its report.

    Raises:
        ConfigError: If the tables or the bank do not fit or a sharding type does not suit them.
    """
    check_bank_split(model, cluster.world_size)
    report = PlanReport()
    planner = _planner(model, config, cluster, report)
    plan, problem = None, None
    if ranks.is_first:
        try:
            plan = planner.plan(model, _sharders(cluster.device))
        except (PlannerError, RuntimeError) as error:
            problem = _no_plan(config, cluster, error)
    plan, problem = ranks.broadcast((plan, problem))  # all ranks say the same, and none waits for one that has ended
    if problem is not None:
        raise problem
    for name, module in model.named_modules():
        if isinstance(module, TensorPool):
            plan.plan[name] = ObjectPoolShardingPlan(ObjectPoolShardingType.ROW_WISE)
    return plan, report


def _no_plan(config: Config, cluster: Cluster, error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    first_line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return ConfigError(
        f"no sharding plan for {cluster.world_size} x {cluster.device} with --embeddings.sharding "
        f"{config.embeddings.sharding}: {first_line}"
    )


@dataclass(frozen=True)
class ShardedModel:
    """A model ready to train.

    Attributes:
        module: The DistributedModelParallel module; call it with a batch.
        optimizer: Steps the fused optimizers of the tables and the dense optimizer.
        plan: Where the tables went, for the records.
        average: Running average of the dense weights, which is what is validated and kept.
    """

    module: DistributedModelParallel
    optimizer: CombinedOptimizer
    plan: PlanReport
    average: WeightAverage

    @property
    def model(self) -> EM3Model:
        """The EM3 model inside the parallel wrappers."""
        inner = self.module.module
        while not isinstance(inner, EM3Model):
            inner = inner.module
        return inner


def shard(model: EM3Model, config: Config, ranks: Ranks, cluster: Cluster) -> ShardedModel:
    """Shard the tables over the ranks, replicate the rest, and set up both optimizers.

    Args:
        model: The model with tables on meta and dense parameters on CPU, equal on every rank.
        config: The run's options.
        ranks: This process among its peers.
        cluster: What the planner plans for.

    Returns:
        The sharded model. Each shard of a table is initialised by its own rank's random generator, from the seed and
        the rank.

    Raises:
        ConfigError: If no plan fits, the memory of a rank is too small after all, or the fused optimizer does not exist
            on this device.
    """
    _fuse_optimizers(model, config.embeddings, ranks.device)
    plan, report = make_plan(model, config, cluster, ranks)
    torch.manual_seed(config.seed * 1_000_003 + 1 + ranks.rank)
    with room_for_shards(model, ranks.world_size):
        module = DistributedModelParallel(
            module=model, device=ranks.device, plan=plan, sharders=_sharders(ranks.device.type)
        )
    if config.train.compile_ranker:
        _compile_ranker(model, ranks.device)
    encoders = [part for part in model.modules() if isinstance(part, EncoderSuffixes)]
    # What is frozen of an encoder needs neither an optimizer nor an average.
    trained = {id(weight): weight.requires_grad for part in encoders for weight in part.parameters()}
    dense_parameters = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(module.named_parameters())
        if trained.get(id(parameter), True)
    }
    dense = KeyedOptimizerWrapper(
        dense_parameters,
        lambda parameters: torch.optim.AdamW(
            _groups(parameters, trained, config.train),
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            fused=True,
        ),
    )
    optimizer = CombinedOptimizer([("tables", module.fused_optimizer), ("dense", dense)])
    return ShardedModel(module, optimizer, report, WeightAverage(dense_parameters, config.train.average_decay))


def _groups(parameters: list[Tensor], encoder_ids: Container[int], options: TrainConfig) -> list[dict[str, Any]]:
    """Part the dense parameters by their learning rate."""
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if id(parameter) not in encoder_ids]},
        {
            "params": [parameter for parameter in parameters if id(parameter) in encoder_ids],
            "lr": options.encoder_learning_rate,
        },
    ]
    return [group for group in groups if group["params"]]


def _compile_ranker(model: EM3Model, device: torch.device) -> None:
    """Compile in place, so that the names of the parameters stay; nothing else of the model has fixed shapes."""
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"--train.compile_ranker needs a C++ compiler ({' or '.join(compilers)}) on this CPU; install one or leave "
            "the option off"
        )
    model.ranker.compile()


def _fuse_optimizers(model: EM3Model, options: EmbeddingConfig, device: torch.device) -> None:
    if options.optimizer == "adam" and device.type == "cpu":
        raise ConfigError(
            "--embeddings.optimizer adam is not supported on CPU by fbgemm; use rowwise_adagrad, adagrad or sgd there"
        )
    if options.precision == "bf16" and device.type == "cpu":
        raise ConfigError("--embeddings.precision bf16 is not supported on CPU by fbgemm; use fp16 or fp32 there")
    for module in model.modules():
        if isinstance(module, UserEmbedding | UserIdEmbedding | ItemEmbedding):
            settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
            if options.optimizer != "sgd":
                settings["eps"] = ADAGRAD_EPSILON
            # A new dict each time: TorchRec writes into it.
            apply_optimizer_in_backward(_OPTIMIZERS[options.optimizer], module.tables.parameters(), settings)
