"""Content-ID-Contrastive alignment: over the global batch (the default), and in the authors' sampled form for parity.

Shape letters: U distinct target items of this rank, K negatives and C logits an item, D width, E width of the heads.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_em3.components.alignment.backend import BackendName
from torchrec_em3.components.alignment.distributed import TransportName, global_info_nce
from torchrec_em3.components.alignment.info_nce import LARGEST_SCALE
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import ALIGNMENTS

__all__ = [
    "ContentIdContrast",
    "ContrastHeads",
    "ContrastOptions",
    "SampledContrast",
    "SampledOptions",
    "sampled_info_nce",
]

HeldSide = Literal["none", "content", "id"]


@dataclass(frozen=True, kw_only=True)
class ContrastOptions:
    """Options of the `global` alignment loss."""

    temperature: float = 0.1
    """Softmax temperature at the start; the authors' code has 0.5 and 0.1."""
    learn_temperature: bool = True
    """Whether the temperature is trained, as the logarithm of its inverse."""
    min_temperature: float = 0.025
    """Lower limit of a learnt temperature; below 0.025 the loss takes about twice the time (tiled: float64)."""
    max_temperature: float = 1.0
    """Upper limit of a learnt temperature."""
    stop_gradient: HeldSide = "none"
    """Side whose tower or table gets no gradient from this loss; its head is trained all the same."""
    popularity_correction: bool = False
    """Whether log(count / mean count) over the global batch is subtracted from an item's logits as a negative."""
    head_dim: int = 0
    """Width of the space in which the two sides are compared; 0 takes the model's width."""
    eps: float = 1e-5
    """Smallest norm that the L2 normalisation divides by."""
    backend: BackendName = "auto"
    """Who computes: tiled, triton (CUDA; multiplies in the type of autocast), or auto: triton wherever it can."""
    transport: TransportName = "auto"
    """How ID vectors travel between ranks: gathered, round a ring in little memory, or gathered up to 2 GiB."""

    def __post_init__(self) -> None:
        """Check ranges."""
        smallest = 1 / LARGEST_SCALE
        if not smallest <= self.min_temperature <= self.max_temperature < math.inf:
            raise ConfigError(
                f"min_temperature {self.min_temperature} and max_temperature {self.max_temperature} must hold "
                f"{smallest:.4f} <= min_temperature <= max_temperature"
            )
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ConfigError(
                f"temperature {self.temperature} is outside [min_temperature, max_temperature] = "
                f"[{self.min_temperature}, {self.max_temperature}]; move it or a limit"
            )
        names = {"stop_gradient": HeldSide, "backend": BackendName, "transport": TransportName}
        for option, kind in names.items():
            if getattr(self, option) not in get_args(kind):
                raise ConfigError(f"{option} is '{getattr(self, option)}'; choose from {', '.join(get_args(kind))}")
        _check_heads(self.head_dim, self.eps)


@dataclass(frozen=True, kw_only=True)
class SampledOptions:
    """Options of the `sampled16` alignment loss."""

    temperature: float = 0.1
    """Softmax temperature, fixed; the authors' code has 0.5 and 0.1."""
    negatives: int = 16
    """Random negatives an item."""
    head_dim: int = 0
    """Width of the space in which the two sides are compared; 0 takes the model's width."""
    eps: float = 1e-5
    """Smallest norm that the L2 normalisation divides by."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it must be positive")
        if self.negatives < 1:
            raise ConfigError(f"negatives is {self.negatives}; it must be at least 1")
        _check_heads(self.head_dim, self.eps)


def _check_heads(head_dim: int, eps: float) -> None:
    """Raise ConfigError unless the options that all contrastive losses share are in range."""
    if head_dim < 0:
        raise ConfigError(f"head_dim is {head_dim}; it must be at least 0 (0: the model's width)")
    if not 0 < eps < 1:
        raise ConfigError(f"eps is {eps}; it must lie between 0 and 1")


class ContrastHeads(nn.Module):
    """Two Linear maps into one space, followed by L2 normalisation [authors' code]."""

    def __init__(self, width: int, head_dim: int, eps: float) -> None:
        """Map `width` to `head_dim` (0: `width`) on both sides."""
        super().__init__()
        self.content = nn.Linear(width, head_dim or width)
        self.id = nn.Linear(width, head_dim or width)
        self.eps = eps

    def forward(self, content_UD: Tensor, id_UD: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors content_UE and id_UE, at least float32."""
        return self._unit(self.content(content_UD)), self._unit(self.id(id_UD))

    def _unit(self, vector_UE: Tensor) -> Tensor:
        exact_UE = vector_UE.to(torch.promote_types(vector_UE.dtype, torch.float32))
        return nn.functional.normalize(exact_UE, dim=1, eps=self.eps)


@ALIGNMENTS.register("global", options=ContrastOptions)
class ContentIdContrast(nn.Module):
    """Symmetric InfoNCE between content and ID of the distinct target items of the global batch.

    Content becomes task-oriented and IDs generalise [abstract]; two Linear heads and the L2 norm are [authors' code].
    [ours]: all other items of the global batch are negatives, an item is never its own negative, the temperature is
    learnt, either side can be held fixed, logits can be corrected for popularity. The matrix of similarities is never
    held, see `info_nce.py`.
    """

    def __init__(self, options: ContrastOptions, width: int, group: dist.ProcessGroup | None = None) -> None:
        """Build the heads.

        Args:
            options: See ContrastOptions.
            width: Width D of both inputs.
            group: Ranks whose items are contrasted; all ranks if None and torch.distributed is initialised at the call.
        """
        super().__init__()
        self.options = options
        self.heads = ContrastHeads(width, options.head_dim, options.eps)
        self._group = group
        log_scale = torch.tensor(-math.log(options.temperature))
        if options.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    def forward(self, content_UD: Tensor, id_UD: Tensor, item_U: Tensor, count_U: Tensor) -> Tensor:
        """Return this rank's share of the loss; collective, so a rank without items must call it too.

        Args:
            content_UD: Content of this rank's distinct target items.
            id_UD: ID embeddings of the same items.
            item_U: Catalogue rows, int64; other ranks may hold some of them too.
            count_U: Rows of this rank's batch that have the item, int64, >= 1.

        Returns:
            Scalar in nats whose mean over ranks is the loss of the global batch; averaged over ranks, the gradients are
            right too. Exactly 0, with zero gradients, where the global batch has fewer than two items.

        Raises:
            NumericError: If the temperature is not finite.
            ConfigError: If the backend is triton, which cannot take these vectors.
        """
        options = self.options
        content_UE, id_UE = self.heads(
            content_UD.detach() if options.stop_gradient == "content" else content_UD,
            id_UD.detach() if options.stop_gradient == "id" else id_UD,
        )
        return global_info_nce(
            content_UE,
            id_UE,
            item_U,
            count_U,
            self._scale(),
            popularity_correction=options.popularity_correction,
            group=self._peers(),
            backend=options.backend,
            transport=options.transport,
        )

    @property
    def temperature(self) -> float:
        """Current temperature, for the records."""
        return 1.0 / float(self._scale().detach())

    def _scale(self) -> Tensor:
        """Return 1 / temperature, after moving a learnt one back within its limits.

        The parameter itself is moved: a clamp in the graph has no gradient outside and would hold it there for ever.
        """
        if self.options.learn_temperature:
            with torch.no_grad():
                low, high = -math.log(self.options.max_temperature), -math.log(self.options.min_temperature)
                self.log_scale.clamp_(low, high)
        return self.log_scale.exp()

    def _peers(self) -> dist.ProcessGroup | None:
        if self._group is None and dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        return self._group


@ALIGNMENTS.register("sampled16", options=SampledOptions)
class SampledContrast(nn.Module):
    """Cross-entropy of an item's other side against 16 random items, both directions [authors' code].

    Negatives are drawn uniformly with replacement, the same ones for both directions, and may be the item itself; no
    stop-gradient. [ours]: they are drawn from the distinct target items of this rank, so the loss is local: ranks do
    not see each other's items, and the loss of the global batch is the mean of the ranks' losses.
    """

    def __init__(self, options: SampledOptions, width: int) -> None:
        """Build the heads for inputs of width `width`."""
        super().__init__()
        self.options = options
        self.heads = ContrastHeads(width, options.head_dim, options.eps)

    def forward(self, content_UD: Tensor, id_UD: Tensor, item_U: Tensor, count_U: Tensor) -> Tensor:
        """Return the loss of this rank's items in nats; 0 with zero gradients for fewer than two, as `global` does.

        Args:
            content_UD: Content of this rank's distinct target items.
            id_UD: ID embeddings of the same items.
            item_U: Catalogue rows; not used, because the positive may be drawn.
            count_U: Rows of the batch that have the item; not used.
        """
        content_UE, id_UE = self.heads(content_UD, id_UD)
        num_items = len(content_UE)
        if num_items < 2:
            return (content_UE.sum() + id_UE.sum()) * 0.0
        negative_UK = torch.randint(num_items, (num_items, self.options.negatives), device=content_UE.device)
        return sampled_info_nce(content_UE, id_UE, negative_UK, self.options.temperature)


def sampled_info_nce(content_UE: Tensor, id_UE: Tensor, negative_UK: Tensor, temperature: float) -> Tensor:
    """Return half the sum of the cross-entropies content -> ID and ID -> content with the given negatives.

    Args:
        content_UE: Unit content vectors.
        id_UE: Unit ID vectors of the same items.
        negative_UK: Rows that serve as negatives of each row, in both directions.
        temperature: Softmax temperature.
    """
    return 0.5 * (
        _direction(content_UE, id_UE, negative_UK, temperature)
        + _direction(id_UE, content_UE, negative_UK, temperature)
    )


def _direction(query_UE: Tensor, key_UE: Tensor, negative_UK: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of finding each query's own key before its negatives."""
    positive_U1 = (query_UE * key_UE).sum(1, keepdim=True)
    sampled_UK = torch.einsum("ue,uke->uk", query_UE, key_UE[negative_UK])
    logit_UC = torch.cat([positive_U1, sampled_UK], dim=1) / temperature
    return nn.functional.cross_entropy(logit_UC, torch.zeros(len(logit_UC), dtype=torch.int64, device=logit_UC.device))
