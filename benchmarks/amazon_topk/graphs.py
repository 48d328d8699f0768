"""The two fixed graphs: users and the items they had in train, and items with similar content.

Shape letters: N nodes, M edges, U items, I width of a modality, K neighbours, D width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.amazon_topk.interactions import Ids

__all__ = ["bipartite_graph", "propagate", "similarity_graph"]

ITEMS_AT_A_TIME = 1024


def bipartite_graph(user: Ids, item: Ids, num_users: int, num_items: int) -> Tensor:
    """Return the symmetric graph [N, N] of users, then items, an edge an interaction, normalised by degree."""
    users_M, items_M = torch.from_numpy(user), torch.from_numpy(item) + num_users
    return _normalised(torch.cat([users_M, items_M]), torch.cat([items_M, users_M]), num_users + num_items)


def similarity_graph(features: Mapping[str, Tensor], weights: Mapping[str, float], neighbours: int) -> Tensor:
    """Return the graph [U, U] of each item's nearest items by cosine, the weighted sum of the modalities' graphs.

    An edge counts in both directions, so that the graph is its own transpose.

    Args:
        features: Vectors [U, I] by modality.
        weights: Weight of each modality's graph.
        neighbours: Items K that each item is joined with.
    """
    graphs = []
    for name, features_UI in features.items():
        unit_UI = torch.nn.functional.normalize(features_UI, dim=1)
        near_UK = torch.cat(
            [_nearest(rows, unit_UI, neighbours) for rows in torch.arange(len(unit_UI)).split(ITEMS_AT_A_TIME)]
        )
        source_M = torch.arange(len(unit_UI)).repeat_interleave(near_UK.shape[1])
        target_M = near_UK.flatten()
        graph = _normalised(torch.cat([source_M, target_M]), torch.cat([target_M, source_M]), len(unit_UI))
        graphs.append(graph.to_sparse_coo() * weights[name])
    return sum(graphs[1:], graphs[0]).coalesce().to_sparse_csr()


def _nearest(rows: Tensor, unit_UI: Tensor, neighbours: int) -> Tensor:
    """Return the K nearest items of some items, themselves left out."""
    cosine = unit_UI[rows] @ unit_UI.T
    cosine[torch.arange(len(rows)), rows] = -torch.inf
    return cosine.topk(neighbours, dim=1).indices


def _normalised(row_M: Tensor, column_M: Tensor, size: int) -> Tensor:
    """Return the 0/1 matrix of the edges, each divided by the roots of both its nodes' degrees."""
    ones = torch.sparse_coo_tensor(
        torch.stack([row_M, column_M]), torch.ones(len(row_M)), (size, size), check_invariants=True
    )
    row_M, column_M = ones.coalesce().indices()
    degree_N = torch.bincount(row_M, minlength=size).clamp_min(1).float()
    value_M = (degree_N[row_M] * degree_N[column_M]).rsqrt()
    graph = torch.sparse_coo_tensor(torch.stack([row_M, column_M]), value_M, (size, size), check_invariants=True)
    return graph.coalesce().to_sparse_csr()


class _SymmetricProduct(torch.autograd.Function):
    """Product with a constant matrix that is its own transpose, so its gradient is the same product."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, rows_ND: Tensor) -> Tensor:
        ctx.graph = graph
        return graph @ rows_ND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.graph @ gradients[0]


def propagate(graph: Tensor, rows_ND: Tensor) -> Tensor:
    """Return graph @ rows_ND for a symmetric, constant graph; about the cost of one sparse product each way."""
    product: Tensor = _SymmetricProduct.apply(graph, rows_ND)  # type: ignore[no-untyped-call]
    return product
