"""Items in two dimensions, and who lies near whom: what the report shows of content and ID embeddings.

Shape letters: N items, D width of an embedding.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

__all__ = [
    "MAX_ITEMS",
    "OTHER",
    "Agreement",
    "nearest",
    "neighbour_agreement",
    "project",
    "sample_items",
    "top_categories",
]

MAX_ITEMS = 1500
NEIGHBOURS = 10
PCA_WIDTH = 50
OTHER = "other"


@dataclass(frozen=True)
class Agreement:
    """Share of an item's nearest neighbours that have its category, and that share for random neighbours."""

    share: float
    chance: float


def sample_items(num_items: int, seed: int, limit: int = MAX_ITEMS) -> NDArray[np.int64]:
    """Return at most `limit` of the positions 0 to num_items - 1, in order, always the same for the same seed."""
    if num_items <= limit:
        return np.arange(num_items)
    return np.sort(np.random.default_rng(seed).choice(num_items, limit, replace=False))


def project(vectors_ND: NDArray, seed: int) -> NDArray[np.float64]:
    """Lay items out in the unit square so that neighbours stay neighbours: unit length, PCA to 50, then t-SNE to 2.

    Distances between far groups and the axes themselves mean nothing in such a map.

    Args:
        vectors_ND: Finite embeddings; only their directions count.
        seed: Makes the map repeatable.

    Returns:
        Coordinates in [0, 1], float64 [N, 2].
    """
    unit_ND = _unit(vectors_ND)
    n, width = unit_ND.shape
    distinct = len(np.unique(unit_ND.round(6), axis=0)) if n else 0
    if distinct < 3:
        return np.full((n, 2), 0.5)
    reduced = PCA(min(PCA_WIDTH, n, width), random_state=seed).fit_transform(unit_ND)
    if distinct > NEIGHBOURS:
        perplexity = min(30.0, (n - 1) / 3)
        reduced = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, max_iter=500).fit_transform(reduced)
    plane = np.zeros((n, 2))
    plane[:, : reduced.shape[1]] = reduced[:, :2]
    low, high = plane.min(axis=0), plane.max(axis=0)
    return (plane - low) / np.where(high > low, high - low, 1.0)


def nearest(vectors_ND: NDArray, queries: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return the k other items nearest by cosine to each position in `queries`, nearest first, int64 [queries, k]."""
    unit_ND = _unit(vectors_ND)
    similarity = unit_ND[queries] @ unit_ND.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(unit_ND) - 1)]


def neighbour_agreement(vectors_ND: NDArray, category: NDArray[np.int64]) -> Agreement | None:
    """Measure how far neighbours share a category, in the space itself and not in its map.

    Args:
        vectors_ND: Embeddings.
        category: Category of each item, int64 [N]; below 0 where it is not known, such items are left out.

    Returns:
        Mean over items of the share of their 10 nearest neighbours with their own category, and its expectation if
        neighbours were drawn at random; None for fewer than 11 items or a single category.
    """
    known = category >= 0
    vectors_ND, category = vectors_ND[known], category[known]
    counts = np.unique(category, return_counts=True)[1]
    n = len(category)
    if n <= NEIGHBOURS or len(counts) < 2:
        return None
    neighbours = nearest(vectors_ND, np.arange(n), NEIGHBOURS)
    share = float((category[neighbours] == category[:, None]).mean())
    return Agreement(share, float((counts * (counts - 1)).sum() / (n * (n - 1))))


def top_categories(names: Sequence[str], limit: int) -> tuple[list[str], NDArray[np.int64]]:
    """Reduce categories to a legend: the `limit` most frequent, by first name where several are joined by "|".

    Args:
        names: Category of each item; "" where it is not known.
        limit: Largest number of names to keep.

    Returns:
        The names kept, most frequent first, then "other" if there is any; and each item's index into them, int64 [N].
    """
    first = [name.split("|")[0].strip() or OTHER for name in names]
    counts = Counter(name for name in first if name != OTHER)
    kept = [name for name, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]]
    place = {name: index for index, name in enumerate(kept)}
    index = np.array([place.get(name, len(kept)) for name in first], dtype=np.int64)
    return (kept + [OTHER] if (index == len(kept)).any() else kept), index


def _unit(vectors_ND: NDArray) -> NDArray[np.float64]:
    wide = vectors_ND.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
