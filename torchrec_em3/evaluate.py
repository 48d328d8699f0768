"""One pass over a split: predictions, metrics with cold-start slices, and the embeddings that the report draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrec_em3.batch import TARGET
from torchrec_em3.components.alignment.contrast import ContrastHeads
from torchrec_em3.components.item_routing import owned_rows
from torchrec_em3.config import Config
from torchrec_em3.content_path import ITEMS_AT_A_TIME
from torchrec_em3.datasets.labels import task_columns
from torchrec_em3.datasets.loader import batch_loader
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.datasets.recent_events import ShardRows
from torchrec_em3.errors import NumericError
from torchrec_em3.faults import fault_point
from torchrec_em3.metrics import attainable_auc, ranking_metrics, sliced_metrics
from torchrec_em3.process_group import Ranks
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.streams import open_stream

__all__ = ["Predictions", "evaluate_split", "predict", "refresh_bank", "save_embeddings"]

MAP_ITEMS = 3000
"""Items whose embeddings a run keeps for the report."""


@dataclass(frozen=True)
class Predictions:
    """Rows of a split in their order; n rows, K tasks.

    Attributes:
        user: User rows [n].
        item: Catalogue rows [n].
        label: 1 or 0: [n] where there is one task, else [n, K].
        logit: As `label`.
    """

    user: np.ndarray
    item: np.ndarray
    label: np.ndarray
    logit: np.ndarray

    def by_task(self, tasks: Sequence[str]) -> dict[str, "Predictions"]:
        """Return the predictions of each task by its name."""
        if self.label.ndim == 1:
            return {tasks[0]: self}
        columns = zip(tasks, self.label.T, self.logit.T, strict=True)
        return {task: Predictions(self.user, self.item, label, logit) for task, label, logit in columns}


@torch.no_grad()
def refresh_bank(sharded: ShardedModel, ranks: Ranks) -> None:
    """Encode the whole catalogue with the current tower into the content bank, each rank the rows it owns. Collective.

    Evaluation starts with this, as serving would: otherwise items that never were a target have no content in
    histories. Items without content are forgotten, whatever they had before.
    """
    content = sharded.model.content
    if content is None or content.bank is None:
        return
    training = content.training
    content.eval()
    owned = owned_rows(sharded.model.item_rows, ranks.rank, ranks.world_size)
    # Writes are collective, so each rank makes as many as rank 0, whose share is the largest.
    for start in range(0, len(owned_rows(sharded.model.item_rows, 0, ranks.world_size)), ITEMS_AT_A_TIME):
        part = owned[start : start + ITEMS_AT_A_TIME]
        items = torch.arange(max(part.start, 1), max(part.stop, 1), device=ranks.device)
        content_UD, present_U = content.encode(items)
        content.bank.write(items[present_U], content_UD[present_U], max(sharded.model.step, 1))
        content.bank.forget(items[~present_U])
    content.train(training)


@torch.no_grad()
def predict(
    sharded: ShardedModel, data: PreparedData | ShardRows, split: Split, config: Config, ranks: Ranks
) -> Predictions | None:
    """Score every row of a split. Collective.

    Returns:
        The predictions in the split's order on rank 0, None on the others.

    Raises:
        NumericError: If a logit is not finite.
    """
    stream = open_stream(config, data, split, ranks)
    sharded.module.eval()
    parts: list[list[np.ndarray]] = []
    for batch in batch_loader(stream, config.loader.num_workers):
        _, output = sharded.module(batch.to(ranks.device))
        real = batch.weight > 0
        item = batch.sparse[TARGET].values()
        parts.append([column[real].numpy() for column in (batch.user, item, batch.label, output.logit.cpu())])
    sharded.module.train()
    fault_point("metrics")
    gathered = ranks.gather(parts)
    predictions, problem = None, ""
    if gathered is not None:
        steps = [rank_part for step in zip(*gathered, strict=True) for rank_part in step]
        predictions = Predictions(*(np.concatenate(column) for column in zip(*steps, strict=True)))
        bad = np.argwhere(~np.isfinite(predictions.logit))
        if bad.size:
            logit = predictions.logit[tuple(bad[0])]
            problem = f"logit {logit} at row {bad[0][0]} of split {split}; the model has diverged"
    if problem := ranks.broadcast(problem):  # all ranks say the same, and none waits for one that has ended
        raise NumericError(problem)
    return predictions


def evaluate_split(
    sharded: ShardedModel,
    data: PreparedData,
    split: Split,
    config: Config,
    ranks: Ranks,
    *,
    save_to: Path | None = None,
) -> dict[str, Any]:
    """Return a split's metrics, whole and in slices, on every rank. Collective.

    They are those of the main task; where there are several tasks, `tasks` holds those of each by name.

    Args:
        sharded: The model; its bank is refreshed first.
        data: The prepared folder.
        split: Which rows.
        config: The run's options.
        ranks: This process among its peers.
        save_to: If given, rank 0 also writes the predictions to this .npz file.
    """
    refresh_bank(sharded, ranks)
    predictions = predict(sharded, data, split, config, ranks)
    metrics = None
    if predictions is not None:
        by_task = predictions.by_task(data.tasks)
        metrics = _measure_tasks(by_task, data, split)
        if save_to is not None:
            save_to.parent.mkdir(parents=True, exist_ok=True)
            np.savez(save_to, **_columns(by_task))
    result: dict[str, Any] = ranks.broadcast(metrics)
    return result


def _columns(by_task: Mapping[str, Predictions]) -> dict[str, Any]:
    """Return what is saved: `label` and `logit` are the main task's, the others' bear the task's name."""
    main = next(iter(by_task.values()))
    columns: dict[str, Any] = {"user": main.user, "item": main.item}
    for name in ("label", "logit"):
        values = [getattr(predictions, name) for predictions in by_task.values()]
        columns |= zip(task_columns(name, list(by_task)), values, strict=True)
    return columns


def _measure_tasks(by_task: Mapping[str, Predictions], data: PreparedData, split: Split) -> dict[str, Any]:
    rows = data.split_rows(split)
    # Only the main task's true probabilities are known.
    truths = [rows["probability"] if data.meta["simulated"] else None, *[None] * (len(by_task) - 1)]
    tasks = {
        task: _measure(predictions, data, rows, truth)
        for (task, predictions), truth in zip(by_task.items(), truths, strict=True)
    }
    main = next(iter(tasks.values()))
    return {**main, "tasks": tasks} if len(tasks) > 1 else main


def _measure(
    predictions: Predictions, data: PreparedData, rows: Mapping[str, np.ndarray], probability: np.ndarray | None
) -> dict[str, Any]:
    metrics: dict[str, Any] = dict(ranking_metrics(predictions.label, predictions.logit, user=predictions.user))
    metrics["slices"] = sliced_metrics(
        predictions.label,
        predictions.logit,
        train_count=data.item_train_count[predictions.item],
        known_user=data.user_train_count[predictions.user] > 0,
        history_length=rows["history_end"] - data.history_offsets[rows["user"]],
        user=predictions.user,
        probability=probability,
    )
    if probability is not None:
        metrics["attainable_auc"] = attainable_auc(probability, predictions.label)
    return metrics


@torch.no_grad()
def save_embeddings(path: Path, sharded: ShardedModel, ranks: Ranks, seed: int) -> None:
    """Write content and ID embeddings of a seeded sample of items, those never trained on included. Collective.

    Where the alignment loss has heads, what it compares is written too: both sides behind them.
    """
    model = sharded.model
    sharded.module.eval()
    rows = np.random.default_rng(seed).permutation(np.arange(1, model.item_rows))[:MAP_ITEMS]
    items = torch.from_numpy(np.sort(rows)).to(ranks.device)
    found = model.items(items, items[:0])
    arrays = {"item": items, "id": found.target_UD, "known": found.known_U}
    if model.content is not None:
        raw_UD, present_U = model.content.encode(items)
        content_UD = model.content.projection(raw_UD)
        arrays |= {"content": content_UD, "present": present_U}
        heads = getattr(model.alignment, "heads", None)
        if isinstance(heads, ContrastHeads):
            arrays["aligned_content"], arrays["aligned_id"] = heads(content_UD, found.target_UD)
    sharded.module.train()
    if ranks.is_first:
        np.savez(path, **{name: array.cpu().numpy() for name, array in arrays.items()})
