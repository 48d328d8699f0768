"""The report's contact sheet: a few items with their pictures, and what lies nearest to them by content and by ID."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.datasets.images import load_image
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.embedding_map import nearest
from torchrec_em3.run_record import Embeddings, RunRecord

__all__ = ["contact_sheet", "thumbnail"]

SEED = 0
EXAMPLES = 4
"""Items shown of those trained most, and as many of those never trained on."""
NEIGHBOURS = 4
MAX_BYTES = 300_000
"""All pictures of a sheet together, as they stand in the page; what comes later is shown by its title alone."""
SIZE = (96, 96)
QUALITY = 60


def contact_sheet(
    records: Sequence[RunRecord], data: Mapping[str, PreparedData], images: Path | None
) -> dict[str, Any] | None:
    """Return the sheet of the first run that has content and whose catalogue is at hand.

    Args:
        records: Runs; the sample of items that a run keeps for its map is what neighbours are looked for in.
        data: Prepared folder by name of the run.
        images: Folder that the pictures named in the catalogue are relative to; None: no sheet.

    Returns:
        `name` of the run; `rows`, each with the `item`, its `train_count` and `spaces`, name and nearest items;
        `num_items` that were compared. An item is its `title` and `picture`, a data URI, or "" if there is none.
    """
    for record in records:
        vectors, catalogue = record.embeddings, data.get(record.name)
        if images is None or vectors is None or vectors.content is None or catalogue is None:
            continue
        if len(vectors.item) and vectors.item.max() < catalogue.item_rows:
            return {"name": record.name, "num_items": len(vectors.item), "rows": _rows(vectors, catalogue, images)}
    return None


def _rows(vectors: Embeddings, data: PreparedData, images: Path) -> list[dict[str, Any]]:
    catalogue = data.items.take(vectors.item)
    train_count = catalogue["train_count"].to_numpy()
    cards = _Cards(images, vectors.item, catalogue["title"].to_pylist(), catalogue["image"].to_pylist())
    assert vectors.content is not None
    spaces = {"content": (vectors.content, vectors.present), "ID": (vectors.id, train_count > 0)}
    rows = []
    for place in _choose(train_count, vectors.present, cards.named):
        near = {name: _near(*space, place) for name, space in spaces.items()}
        rows.append(
            {
                "item": cards.card(place),
                "train_count": int(train_count[place]),
                "spaces": [(name, [cards.card(other) for other in found]) for name, found in near.items() if found],
            }
        )
    return rows


def _choose(train_count: NDArray[np.int64], present: NDArray[np.bool_], pictured: NDArray[np.bool_]) -> list[int]:
    """Return the places of the items trained most and of a seeded few never trained on, all of them with a picture."""
    often = np.argsort(-train_count, kind="stable")
    often = often[(pictured & present & (train_count > 0))[often]][:EXAMPLES]
    never = np.flatnonzero(pictured & present & (train_count == 0))
    never = np.random.default_rng(SEED).permutation(never)[:EXAMPLES]
    return [*often.tolist(), *np.sort(never).tolist()]


def _near(vectors_ND: NDArray, valid_N: NDArray[np.bool_], place: int) -> list[int]:
    usable = np.flatnonzero(valid_N & np.isfinite(vectors_ND).all(axis=1))
    if place not in usable or len(usable) < 2:
        return []
    query = np.array([np.searchsorted(usable, place)])
    return usable[nearest(vectors_ND[usable], query, NEIGHBOURS)[0]].tolist()


def thumbnail(images: Path, name: str, size: tuple[int, int] = SIZE) -> str:
    """Return a small picture as a data URI, or "" if there is none by that name inside the folder `images`."""
    path = images / name
    if not name or not path.resolve().is_relative_to(images.resolve()):
        return ""
    image = load_image(path).image
    if image is None:
        return ""
    image.thumbnail(size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class _Cards:
    """Items as the page shows them; counts the bytes of their pictures."""

    def __init__(self, images: Path, item: NDArray[np.int64], titles: list[str], pictures: list[str]) -> None:
        self.named = np.array([bool(picture) for picture in pictures])
        self._images, self._left = images, MAX_BYTES
        self._titles = [title or f"item {row}" for title, row in zip(titles, item, strict=True)]
        self._pictures = pictures

    def card(self, place: int) -> dict[str, str]:
        """Return title and picture of an item."""
        return {"title": self._titles[place], "picture": self._thumbnail(self._pictures[place])}

    def _thumbnail(self, name: str) -> str:
        uri = thumbnail(self._images, name)
        if len(uri) > self._left:
            return ""
        self._left -= len(uri)
        return uri
