"""The report's view of where the content tower looks: weights over the patches of a picture and the words of a text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.item_attention import ItemAttention
from torchrec_em3.report_neighbours import thumbnail

__all__ = ["attention_cards"]

SIZE = (180, 180)
DARKEST = 0.85
"""How far the patch with the least attention is darkened."""


def attention_cards(
    found: Sequence[ItemAttention], data: PreparedData, images: Path | None, max_items: int = 24
) -> list[dict[str, Any]]:
    """Return what the page shows of each item.

    Args:
        found: The items.
        data: Their catalogue.
        images: Folder that the pictures named in the catalogue are relative to; None shows patches without pictures.
        max_items: More are left out, so that the page stays small.

    Returns:
        For each item `title`, `train_count`; `shares` of the attention by modality, mean over the queries; `picture`, a
        data URI or ""; `overlay`, the patches, or "" where the item has none; `words`, each with its weight over that
        of the item's heaviest.
    """
    cards = []
    for entry in found[:max_items]:
        row = data.items.slice(entry.item, 1).to_pylist()[0]
        weights = {name: weight_QT.mean(0) for name, weight_QT in entry.weights.items()}
        text_T = weights.get("text", np.zeros(0))
        # A pooled modality has one weight for all its tokens: that is its share, and nothing is seen inside.
        told = len(entry.pieces) == len(text_T) and len(text_T) > 0
        overlay = _overlay(weights.get("image", np.zeros(0)))
        cards.append(
            {
                "title": row["title"] or f"item {entry.item}",
                "train_count": row["train_count"],
                "shares": [(name, float(weight_T.sum())) for name, weight_T in weights.items()],
                "picture": thumbnail(images, row["image"], SIZE) if images is not None and overlay else "",
                "overlay": overlay,
                "words": list(zip(entry.pieces, (text_T / text_T.max()).tolist(), strict=True)) if told else [],
            }
        )
    return cards


def _overlay(weight_T: NDArray) -> Markup:
    """Return the patches as a grid that is laid over the picture, dark where there is little attention."""
    side = math.isqrt(len(weight_T))
    if side < 2 or side * side != len(weight_T):
        return Markup("")
    cells = []
    for place, weight in enumerate(weight_T):
        shade = DARKEST * (1 - weight / weight_T.max())
        x, y = place % side, place // side
        cells.append(
            f'<rect x="{x}" y="{y}" width="1.01" height="1.01" fill="#000" fill-opacity="{shade:.2f}">'
            f"<title>{weight:.3f}</title></rect>"
        )
    head = f'<svg viewBox="0 0 {side} {side}" preserveAspectRatio="none" role="img" aria-label="attention by patch">'
    return Markup(head + "".join(cells) + "</svg>")
