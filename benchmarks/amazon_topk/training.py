"""Trains one recommender, chooses the epoch on validation, measures the chosen one on test once.

Shape letters: B interactions of a batch.
"""

import copy
import logging
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.amazon_topk.interactions import Interactions
from benchmarks.amazon_topk.models import ModelOptions, Recommender
from benchmarks.amazon_topk.ranking import SELECTED_BY, measure
from torchrec_em3.errors import ConfigError, NumericError

__all__ = ["TrainOptions", "fit"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How it is trained."""

    epochs: int = 200
    """Epochs at most."""
    batch_size: int = 8192
    """Interactions of a step."""
    learning_rate: float = 5e-3
    """Of Adam, for the embeddings."""
    content_learning_rate: float = 1e-4
    """Of Adam, for what makes content of features, and for the heads of the contrast."""
    evaluate_every: int = 5
    """Epochs between two looks at the validation part."""
    patience: int = 4
    """Looks without a better one after which training ends."""
    validation_users: int = 8000
    """Users whose validation items choose the epoch, drawn once for all runs; 0 takes all."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        for name in ("epochs", "batch_size", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be >= 1")


def fit(
    options: ModelOptions, training: TrainOptions, data: Interactions, features: Mapping[str, Tensor], seed: int
) -> dict[str, Any]:
    """Train, and return the figures of the run: validation at the chosen epoch, test, costs.

    Args:
        options: What is trained.
        training: How.
        data: Interactions with their split.
        features: Frozen vectors by modality.
        seed: Seed of the weights, the order and the sampled items; the split does not depend on it.

    Raises:
        NumericError: If the loss is not finite.
    """
    torch.manual_seed(seed)
    started = time.process_time()
    model = Recommender(options, data, features)
    others = [parameter for parameter in model.parameters() if parameter is not model.rows.weight]
    groups: list[dict[str, Any]] = [
        {"params": [model.rows.weight]},
        {"params": others, "lr": training.content_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups, lr=training.learning_rate, fused=True)
    looked_at = _validation_users(data, training.validation_users)
    best: dict[str, float] = {}
    state, best_epoch = copy.deepcopy(model.state_dict()), 0
    for epoch in range(1, training.epochs + 1):
        loss = _train_epoch(model, optimizer, data, training.batch_size)
        if epoch % training.evaluate_every and epoch != training.epochs:
            continue
        metrics = measure(_vectors(model), data, "validation", looked_at)
        logger.info("epoch %d loss %.4f validation %s %.4f", epoch, loss, SELECTED_BY, metrics[SELECTED_BY])
        if metrics[SELECTED_BY] > best.get(SELECTED_BY, -1.0):
            best, best_epoch, state = metrics, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= training.patience * training.evaluate_every:
            break
    train_seconds = time.process_time() - started
    model.load_state_dict(state)
    return {
        "epoch": best_epoch,
        "last_epoch": epoch,
        "validation": best,
        "test": measure(_vectors(model), data, "test"),
        "train_cpu_seconds": train_seconds,
        "cpu_seconds": time.process_time() - started,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _train_epoch(model: Recommender, optimizer: torch.optim.Optimizer, data: Interactions, batch_size: int) -> float:
    """Train on each interaction of the training part once; return the mean loss."""
    model.train()
    losses = []
    for user_B, item_B, other_B in _batches(data, batch_size):
        loss = model.loss(user_B, item_B, other_B)
        if not bool(torch.isfinite(loss)):
            raise NumericError(f"the loss is {loss.item()}; lower --training.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _batches(data: Interactions, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return shuffled interactions, each with an item that its user did not have in train."""
    user, item = (torch.from_numpy(ids) for ids in data.pairs("train"))
    known = (user * data.num_items + item).sort().values
    other = torch.randint(data.num_items, user.shape)
    while True:
        key = user * data.num_items + other
        place = torch.searchsorted(known, key).clamp_max(len(known) - 1)
        clash = known[place] == key
        if not bool(clash.any()):
            break
        other[clash] = torch.randint(data.num_items, (int(clash.sum()),))
    for rows_B in torch.randperm(len(user)).split(batch_size):
        yield user[rows_B], item[rows_B], other[rows_B]


def _validation_users(data: Interactions, count: int) -> np.ndarray:
    """Return users with validation items, the same for all runs on this split."""
    users = np.unique(data.pairs("validation")[0])
    if count == 0 or count >= len(users):
        return users
    return np.sort(np.random.default_rng(0).choice(users, count, replace=False))


def _vectors(model: Recommender) -> tuple[Tensor, Tensor]:
    """Return the vectors of users and items without dropout and gradient."""
    model.eval()
    with torch.no_grad():
        vectors = model()
    return vectors.users_VD, vectors.scored_UD
