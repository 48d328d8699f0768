"""Full ranking: every item of the catalogue that the user did not have in train, and how well the held-out ones rank.

Shape letters: V users, U items, E evaluated users, R ranks (20), M held-out items of a user at most.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import ndcg_score, recall_score
from torch import Tensor

from benchmarks.amazon_topk.interactions import Ids, Interactions

__all__ = ["CUTOFFS", "SELECTED_BY", "best_items", "measure", "rank_metrics"]

CUTOFFS = (10, 20)
SELECTED_BY = "recall@20"
USERS_AT_A_TIME = 512


def best_items(users_VD: Tensor, items_UD: Tensor, evaluated_E: Tensor, train: csr_array, ranks: int) -> Ids:
    """Return the items [E, R] that score highest for each user, best first, those of the training part left out.

    Args:
        users_VD: Vectors of all users.
        items_UD: Vectors of all items.
        evaluated_E: Users to rank for.
        train: Matrix of users and items with an entry for each interaction of the training part.
        ranks: R, at most the items that no user of these had all of.
    """
    best = []
    for chunk in evaluated_E.split(USERS_AT_A_TIME):
        scores = users_VD[chunk] @ items_UD.T
        row, item = train[chunk.numpy()].nonzero()
        scores[torch.from_numpy(row), torch.from_numpy(item)] = -torch.inf
        best.append(scores.topk(ranks, dim=1).indices)
    return torch.cat(best).numpy()


def rank_metrics(best_ER: Ids, held_out: csr_array) -> dict[str, float]:
    """Return recall and NDCG at 10 and 20, means over the users, by scikit-learn.

    Args:
        best_ER: Items in their order, best first, R >= 20.
        held_out: Matrix [E, U] with a 1 for each held-out item; each user has at least one.
    """
    metrics = {}
    for cutoff in CUTOFFS:
        found = _matrix(best_ER[:, :cutoff], held_out.shape[1])
        metrics[f"recall@{cutoff}"] = float(recall_score(held_out, found, average="samples"))
    relevance, scores = _listed_and_missed(best_ER, held_out)
    for cutoff in CUTOFFS:
        metrics[f"ndcg@{cutoff}"] = float(ndcg_score(relevance, scores, k=cutoff, ignore_ties=True))
    return metrics


def measure(
    vectors: tuple[Tensor, Tensor], data: Interactions, part: str, evaluated: Ids | None = None
) -> dict[str, float]:
    """Return the metrics of one part over all its users, or over those named.

    Args:
        vectors: users_VD and items_UD.
        data: Interactions with their split.
        part: validation or test.
        evaluated: Users, each with held-out items in this part.
    """
    held_out = _interaction_matrix(data, part)
    if evaluated is None:
        evaluated = np.flatnonzero(np.diff(held_out.indptr))
    train = _interaction_matrix(data, "train")
    best_ER = best_items(*vectors, torch.from_numpy(evaluated), train, max(CUTOFFS))
    return rank_metrics(best_ER, held_out[evaluated])


def _interaction_matrix(data: Interactions, part: str) -> csr_array:
    user, item = data.pairs(part)
    return csr_array((np.ones(len(user), dtype=np.int8), (user, item)), shape=(data.num_users, data.num_items))


def _matrix(items_ER: Ids, num_items: int) -> csr_array:
    """Return the 0/1 matrix [E, U] of some items a user."""
    ends = np.arange(len(items_ER) + 1) * items_ER.shape[1]
    return csr_array(
        (np.ones(items_ER.size, dtype=np.int8), items_ER.flatten(), ends), shape=(len(items_ER), num_items)
    )


def _listed_and_missed(best_ER: Ids, held_out: csr_array) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return relevance and score [E, R + M] of the listed items in their order and, below them, of those missed.

    All other items are neither relevant nor listed, so that leaving them out changes no metric.
    """
    users, ranks = best_ER.shape
    rows = np.arange(users)[:, None]
    listed = held_out[np.broadcast_to(rows, best_ER.shape).flatten(), best_ER.flatten()].reshape(best_ER.shape)
    missed_E = np.diff(held_out.indptr) - listed.sum(1)
    missed = np.arange(missed_E.max(initial=0)) < missed_E[:, None]
    relevance = np.concatenate([np.asarray(listed), missed], axis=1).astype(np.int8)
    scores = np.zeros_like(relevance)
    scores[:, :ranks] = np.arange(ranks, 0, -1)
    return relevance, scores
