"""The items nearest to one item, by content and by ID.

Shape letters: N items, D width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.errors import ConfigError
from torchrec_em3.item_embeddings import ItemEmbeddings
from torchrec_em3.registry import closest

__all__ = ["SPACES", "Neighbour", "find_items", "nearest_items"]

SPACES = ("content", "id")


@dataclass(frozen=True)
class Neighbour:
    """An item near another: its place among the embeddings, and the cosine of the two."""

    item: int
    similarity: float


def find_items(items: ItemEmbeddings, wanted: str) -> list[int]:
    """Return the places of the items that `wanted` may mean, in catalogue order.

    That is the item of this raw id; or else those of this title; or else those whose title contains it. Case is
    ignored in titles.

    Raises:
        ConfigError: If there is none.
    """
    if wanted in items.raw_id:
        return [items.raw_id.index(wanted)]
    folded = wanted.casefold()
    containing = [place for place, title in enumerate(items.title) if folded and folded in title.casefold()]
    found = [place for place in containing if items.title[place].casefold() == folded] or containing
    if not found:
        hint = closest(wanted, [title for title in items.title if title])
        raise ConfigError(f"no item has the id '{wanted}' or a title that contains it.{hint}")
    return found


def nearest_items(items: ItemEmbeddings, item: int, space: str, top: int) -> list[Neighbour] | None:
    """Return the other items nearest by cosine, nearest first; None if the item has no vector of its own there.

    Args:
        items: The embeddings.
        item: Place of the item among them.
        space: "content" or "id"; items without a vector of their own in it are nobody's neighbours.
        top: How many to return, at most.
    """
    valid_N = items.valid(space)
    if space not in items.vectors or not valid_N[item]:
        return None
    similarity_N = _cosine(items.vectors[space], item)
    others = np.flatnonzero(valid_N)
    others = others[others != item]
    nearest = others[np.argsort(-similarity_N[others], kind="stable")[:top]]
    return [Neighbour(int(other), float(similarity_N[other])) for other in nearest]


def _cosine(vectors_ND: NDArray[np.float32], item: int) -> NDArray[np.float32]:
    """Return the cosine of each row with row `item`; 0 for rows of zeros."""
    norm_N = np.linalg.norm(vectors_ND, axis=1)
    return (vectors_ND @ vectors_ND[item]) / np.maximum(norm_N * norm_N[item], np.float32(1e-12))
