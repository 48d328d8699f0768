"""Every option of a training run, as one tree of frozen dataclasses."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchrec_em3.errors import ConfigError

__all__ = [
    "NONE",
    "Config",
    "EmbeddingConfig",
    "EncoderTraining",
    "EncodersConfig",
    "LoaderConfig",
    "ModelConfig",
    "TableConfig",
    "TrainConfig",
    "check_seed",
]

NONE = "none"
"""Name that switches a pluggable part off."""
SEEDS = 2**32


def check_seed(option: str, seed: int) -> None:
    """Refuse seeds that not all generators take."""
    if not 0 <= seed < SEEDS:
        raise ConfigError(f"--{option} is {seed}, must be from 0 to {SEEDS - 1}")


def _at_least(option: str, value: float, limit: float) -> None:
    if not value >= limit:
        raise ConfigError(f"--{option} is {value}, must be at least {limit}")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How rows become batches."""

    batch_size: int = 2048
    """Rows per step on each rank."""
    max_history: int = 50
    """Most recent events of the user that a row sees."""
    shuffle: Literal["rows", "strata"] = "rows"
    """How training rows are shuffled each epoch: rows among all, which every rank then reads, or within 64 strata (runs
    of time) that all give the same number of rows to each step, so that a rank reads its own strata only."""
    num_workers: int = 0
    """Loader processes per rank; 0 collates in the training process, which is vectorised and usually fast enough."""

    def __post_init__(self) -> None:
        """Check the limits."""
        _at_least("loader.batch_size", self.batch_size, 1)
        _at_least("loader.max_history", self.max_history, 1)
        _at_least("loader.num_workers", self.num_workers, 0)


@dataclass(frozen=True, kw_only=True)
class EncoderTraining:
    """What is trained of one encoder's layers above the cut at which `em3 prepare` stored its tokens."""

    training: Literal["frozen", "lora", "last_n", "full"] = "frozen"
    """frozen, lora (low-rank adapters), last_n (the upper layers), or full (everything; needs a cut at 0)."""
    layers: int = 0
    """Layers that lora and last_n train, from the top; 0 for all above the cut."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: int = 16
    """Weight of the adapters: each is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        """Check the limits."""
        _at_least("model.encoders: layers", self.layers, 0)
        _at_least("model.encoders: rank", self.rank, 1)


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """The encoders' layers above the cuts of the token store."""

    text: EncoderTraining = field(default_factory=EncoderTraining)
    """Training of the text encoder."""
    image: EncoderTraining = field(default_factory=EncoderTraining)
    """Training of the image encoder."""
    bfloat16: bool = False
    """Run these layers under autocast to bfloat16; needs CUDA, or a CPU with AVX512_BF16 or AMX."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model graph: which part stands where, and its width."""

    embedding_dim: int = 64
    """Width of ID embeddings and of content."""
    ranker: str = "din"
    """Registered ranker: from named blocks to logits."""
    ranker_options: dict[str, Any] = field(default_factory=dict)
    """Options of that ranker."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of the loss of single tasks by name, where the data has several; 1 for those left out."""
    attention_hidden: tuple[int, ...] = (32,)
    """Hidden widths of the target attention over the IDs of the history."""
    content_attention_hidden: tuple[int, ...] = ()
    """Hidden widths of the target attention over the content of the history; none scores linearly, at half the cost."""
    content: str = "fusion_qformer"
    """Registered content tower, or none for an ID-only model."""
    content_options: dict[str, Any] = field(default_factory=dict)
    """Options of that tower."""
    codes: Literal["content", "features", "none"] = "content"
    """Where semantic codes go, if the data has any: to the content tower as modalities, to the ranker as ID features
    of target and history beside whatever content there is, or nowhere."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """Training of the encoders, where `em3 prepare` has cut them."""
    history: str = "cache"
    """Registered history content, or none to leave content out of the history."""
    history_options: dict[str, Any] = field(default_factory=dict)
    """Options of that history content."""
    similarity: Literal["none", "statistics", "histogram", "both"] = "none"
    """How the cosines of the target's and the history items' content become one more block; none leaves them out."""
    encode_fraction: float = 1.0
    """Share of the distinct targets that a training step encodes; the others' content comes from the bank."""
    routing: Literal["local", "owner"] = "local"
    """Which rank encodes a target: each rank its own, or the rank that owns the item, once for all ranks."""
    stop_gradient: bool = False
    """Keep the ranking loss from tower and encoders, which the alignment loss then trains alone; an ablation."""
    alignment: str = "global"
    """Registered Content-ID-Contrastive loss."""
    alignment_options: dict[str, Any] = field(default_factory=dict)
    """Options of that loss."""
    alignment_weight: float = 0.01
    """Weight of the alignment loss; 0 leaves it out altogether."""
    unknown_id_rate: float = 0.1
    """Share of training targets whose ID is hidden (row 0), so that row 0 and content learn to rank unknown items."""

    def __post_init__(self) -> None:
        """Check the limits."""
        _at_least("model.embedding_dim", self.embedding_dim, 4)
        for task, weight in self.task_weights.items():
            if not 0.0 <= weight < float("inf"):
                raise ConfigError(f"--model.task_weights.{task} is {weight}, must be a finite number >= 0")
        if self.embedding_dim % 4:
            raise ConfigError(
                f"--model.embedding_dim is {self.embedding_dim}, must be a multiple of 4 (fbgemm kernels)"
            )
        _at_least("model.alignment_weight", self.alignment_weight, 0.0)
        if not 0.0 < self.encode_fraction <= 1.0:
            raise ConfigError(f"--model.encode_fraction is {self.encode_fraction}, must be in (0, 1]")
        if self.stop_gradient and (self.alignment_weight == 0 or self.history == "shared"):
            raise ConfigError(
                "--model.stop_gradient with --model.alignment_weight 0 leaves the tower untrained; give it a weight"
                if self.alignment_weight == 0
                else "--model.stop_gradient with --model.history shared: the ranking loss trains the tower from the "
                "history; use cache"
            )
        if not 0.0 <= self.unknown_id_rate < 1.0:
            raise ConfigError(f"--model.unknown_id_rate is {self.unknown_id_rate}, must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """One table, an entry of `EmbeddingConfig.tables`: its ids and its constraints; what is left out is as for all."""

    sharding: tuple[Literal["table_wise", "row_wise", "column_wise"], ...] = ()
    """Sharding types to choose from."""
    kernels: tuple[Literal["fused", "fused_uvm_caching"], ...] = ()
    """Kernels to choose from; fused_uvm_caching (CUDA) keeps the table in host memory and a cache on the device."""
    cached_share: float | None = None
    """Share of the rows that the cache of fused_uvm_caching holds; null: TorchRec's 0.2."""
    ids: Literal["fixed", "hashed", "managed"] = "fixed"
    """Ids of user_table or item_table: fixed (rows of the prepared vocabulary), or raw 64-bit ids that share rows
    (hashed) or are given rows of their own while training (managed; always row-wise and fused)."""
    rows: int = 0
    """Rows of a table of raw ids, row 0 included; a managed table's must be a multiple of the number of ranks."""
    eviction: Literal["lfu", "lru", "distance_lfu"] | None = None
    """Which ids of a managed table lose their rows to others: rare ones (lfu, the default), those not seen for longest
    (lru), or those rare for the time since they were seen (distance_lfu)."""

    def __post_init__(self) -> None:
        """Check the limits."""
        where = "--embeddings.tables"
        if self.ids == "fixed" and self.rows:
            raise ConfigError(f"{where}: rows is {self.rows} with ids fixed, whose rows the data says; leave it out")
        if self.ids != "fixed" and self.rows < 2:
            raise ConfigError(f"{where}: rows is {self.rows} with ids {self.ids}, must be at least 2")
        if self.eviction is not None and self.ids != "managed":
            raise ConfigError(f"{where}: eviction is {self.eviction} with ids {self.ids}; only managed ids are evicted")
        if self.ids == "managed" and (set(self.sharding) - {"row_wise"} or set(self.kernels) - {"fused"}):
            raise ConfigError(f"{where}: a table of managed ids is row_wise and fused; leave sharding and kernels out")
        if self.cached_share is not None and not 0.0 < self.cached_share < 1.0:
            raise ConfigError(f"--embeddings.tables: cached_share is {self.cached_share}, must be in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Sharded tables and the optimizer that runs inside their backward pass."""

    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    """Fused optimizer; adam needs CUDA."""
    learning_rate: float = 0.05
    """Learning rate of the tables."""
    weight_decay: float = 0.0
    """L2 decay of the rows that a step touches."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """How tables are stored. CUDA rounds fp16 and bf16 stochastically, a CPU rounds fp16 to nearest and has no bf16."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise"] = "auto"
    """Sharding type of every table; auto lets the planner choose between table-wise and row-wise."""
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of single tables by name, for example item_table: the fields of TableConfig, above `sharding`."""

    def __post_init__(self) -> None:
        """Check the limits."""
        _at_least("embeddings.learning_rate", self.learning_rate, 0.0)
        _at_least("embeddings.weight_decay", self.weight_decay, 0.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = 8
    """Largest number of passes over the training rows."""
    learning_rate: float = 1e-3
    """Learning rate of the dense parameters (Adam)."""
    encoder_learning_rate: float = 1e-4
    """Learning rate of what is trained of the encoders (Adam)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the dense parameters."""
    compile_ranker: bool = False
    """Compile the ranker by torch.compile: a few seconds at the start, faster steps; a CPU needs a C++ compiler."""
    average_decay: float = 0.99
    """Decay a step of the running average of the dense weights, which is validated and kept; 0 takes the last."""
    evaluate_every: int = 0
    """Steps between validations; 0 validates at the end of each epoch."""
    checkpoint_every: int = 0
    """Steps between checkpoints besides those at validation; 0 for none."""
    patience: int = 2
    """Validations without improvement before training stops."""
    select_by: Literal["auc", "gauc", "logloss"] = "auc"
    """Validation metric that chooses the checkpoint."""
    log_every: int = 20
    """Steps between log lines."""
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the scalars of metrics.jsonl are shown as well; wandb and mlflow need their packages."""
    keep_checkpoints: int = 1
    """Checkpoints kept besides the best one."""
    async_checkpoints: bool = False
    """Write checkpoints in the background, from a copy of the state in host memory, while training goes on."""
    mirror: str = ""
    """fsspec URL such as s3://bucket/run to which each checkpoint is copied in the background, and the rest of the run
    folder at its end; --resume fetches from there what this machine lacks. Empty for none."""
    step_timeout: float = 600.0
    """Seconds after which a step that has not ended ends the job, with the stacks of all ranks; 0 waits for ever."""

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("epochs", "patience", "log_every", "keep_checkpoints"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("evaluate_every", "checkpoint_every", "weight_decay", "step_timeout"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "encoder_learning_rate"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.mirror and "://" not in self.mirror:
            raise ConfigError(f"--train.mirror is {self.mirror}, must be a URL such as s3://bucket/run")
        if not 0.0 <= self.average_decay < 1.0:
            raise ConfigError(f"--train.average_decay is {self.average_decay}, must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    data: str = ""
    """Prepared folder (see `em3 prepare`), or its fsspec URL such as s3://bucket/data."""
    run: str = ""
    """Run folder to write; under torchrun say --run_folder, because torchrun takes --run for an option of its own."""
    seed: int = 0
    """Seed of the initial weights, the order of rows and everything else that is random."""
    plugins: str = ""
    """Module that registers your own parts, for example my_package.towers; several with commas between them."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    embeddings: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Check the limits."""
        check_seed("seed", self.seed)

    @property
    def uses_content(self) -> bool:
        """Whether the model has a content tower at all."""
        return self.model.content != NONE

    @property
    def uses_code_features(self) -> bool:
        """Whether semantic codes are features of the ranker."""
        return self.model.codes == "features"

    def as_dict(self) -> dict[str, Any]:
        """Return the tree as plain values, ready for YAML."""
        return asdict(self)
