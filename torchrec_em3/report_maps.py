"""The report's view into the embeddings: content map beside ID map, and examples of an item's nearest neighbours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.embedding_map import (
    OTHER,
    nearest,
    neighbour_agreement,
    project,
    sample_items,
    top_categories,
)
from torchrec_em3.plots import COLOURS, Dot, map_chart
from torchrec_em3.run_record import RunRecord
from torchrec_em3.variants import group_variants

__all__ = ["embedding_maps"]

SEED = 0
EXAMPLES = 4
NEIGHBOURS = 3


def embedding_maps(records: Sequence[RunRecord], data: Mapping[str, PreparedData]) -> list[dict[str, Any]]:
    """Return maps and neighbour examples of one run of each model, the first that has embeddings.

    Args:
        records: Runs; their embeddings may be missing.
        data: Prepared folder by name of the run: titles, categories and training counts; may lack runs.

    Returns:
        For each run shown: `name`; `legend`, category names with their colour numbers; `charts`, each with `title`,
        `chart` and `agreement` of nearest neighbours in category; `examples`, see `_examples`; `num_items` drawn and
        `num_unseen`, those of them with content and without training rows.
    """
    sections: list[dict[str, Any]] = []
    for variant in group_variants(records):
        usable = (run for run in variant.runs if run.embeddings is not None and len(run.embeddings.item))
        record = next(usable, None)
        if record is not None:
            sections.append(_section(record, data.get(record.name)))
    return sections


class _Items:
    """The items of a map: at most 1,500 of those a run kept, with what the catalogue says of them."""

    def __init__(self, record: RunRecord, data: PreparedData | None) -> None:
        vectors = record.embeddings
        assert vectors is not None
        chosen = sample_items(len(vectors.item), SEED)
        self.item = vectors.item[chosen]
        self.id = vectors.id[chosen]
        self.content = None if vectors.content is None else vectors.content[chosen]
        self.has_content = vectors.present[chosen]
        if data is not None and self.item.max() < data.item_rows:
            catalogue = data.items.take(self.item)
            titles = catalogue["title"].to_pylist()
            self.title = [title or f"item {row}" for title, row in zip(titles, self.item, strict=True)]
            self.train_count: NDArray[np.int64] | None = catalogue["train_count"].to_numpy()
            categories = [category or "" for category in catalogue["category"].to_pylist()]
        else:
            self.title = [f"item {row}" for row in self.item]
            self.train_count = None
            categories = [""] * len(self.item)
        names, index = top_categories(categories, COLOURS - 1)
        self.colour = np.where(index == names.index(OTHER), COLOURS - 1, index) if OTHER in names else index
        self.legend = [(name, COLOURS - 1 if name == OTHER else i) for i, name in enumerate(names)]
        # Many names joined to "other" are not one category.
        self.category = np.where(self.colour == COLOURS - 1, -1, index)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Items with an ID embedding of their own: those with training rows, or all where that is not known."""
        return np.ones(len(self.item), dtype=bool) if self.train_count is None else self.train_count > 0


def _section(record: RunRecord, data: PreparedData | None) -> dict[str, Any]:
    items = _Items(record, data)
    spaces: list[tuple[str, NDArray, NDArray[np.bool_]]] = []
    if items.content is not None:
        finite = np.isfinite(items.content).all(axis=1)
        spaces.append(("content", items.content, finite & items.has_content))
    spaces.append(("ID", items.id, np.isfinite(items.id).all(axis=1) & items.known))
    return {
        "name": record.name,
        "legend": items.legend if any(name != OTHER for name, _ in items.legend) else [],
        "charts": [_chart(items, name, vectors, mask) for name, vectors, mask in spaces if mask.any()],
        "examples": _examples(items, spaces),
        "num_items": len(items.item),
        "num_unseen": int((~items.known & items.has_content).sum()),
    }


def _chart(items: _Items, space: str, vectors_ND: NDArray, mask: NDArray[np.bool_]) -> dict[str, Any]:
    rows = np.flatnonzero(mask)
    title = f"{space[0].upper()}{space[1:]} embeddings"
    xy = project(vectors_ND[rows], SEED)
    dots = [
        Dot(float(x), float(y), int(items.colour[row]), items.title[row], hollow=not items.known[row])
        for row, (x, y) in zip(rows, xy, strict=True)
    ]
    return {
        "title": title,
        "chart": map_chart(dots, title),
        "agreement": neighbour_agreement(vectors_ND[rows], items.category[rows]),
        "num_items": len(rows),
    }


def _examples(items: _Items, spaces: Sequence[tuple[str, NDArray, NDArray[np.bool_]]]) -> list[dict[str, Any]]:
    """Return a few items, the most and the never trained on, with the titles nearest to them in each space."""
    if items.train_count is None:
        return []
    often = np.argsort(-items.train_count, kind="stable")[:EXAMPLES]
    never = np.flatnonzero((items.train_count == 0) & items.has_content)
    never = never[np.sort(np.random.default_rng(SEED).permutation(len(never))[:EXAMPLES])]
    if items.content is None:
        never = never[:0]
    return [
        {
            "title": items.title[row],
            "train_count": int(items.train_count[row]),
            "near": [
                {"space": title, "titles": _near(items, vectors, mask, int(row))} for title, vectors, mask in spaces
            ],
        }
        for row in (*often, *never)
    ]


def _near(items: _Items, vectors_ND: NDArray, mask: NDArray[np.bool_], row: int) -> list[str]:
    if not mask[row] or mask.sum() < 2:
        return []
    rows = np.flatnonzero(mask)
    place = np.searchsorted(rows, row)
    return [items.title[other] for other in rows[nearest(vectors_ND[rows], np.array([place]), NEIGHBOURS)[0]]]
