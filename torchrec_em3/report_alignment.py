"""The report's view of the alignment: cosines of content with its own ID, and with the ID of another item.

Shape letters: N items with content and an ID of their own, E width of the alignment's space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from torchrec_em3.plots import Line, line_chart
from torchrec_em3.run_record import Embeddings
from torchrec_em3.variants import Variant

__all__ = ["alignment_histograms", "pair_cosines"]

BINS = 40
SEED = 0


def alignment_histograms(variants: Sequence[Variant]) -> dict[str, Any]:
    """Return a histogram of one run of each variant that has kept what its alignment loss compares.

    Returns:
        `charts`, each with the `name` of the run, the `chart`, the number of `items`, the mean cosine of `matched` and
        `other` pairs, and the share `above` of pairs of pairs in which the matched one is the more similar; `without`,
        names of runs with content that kept no such vectors.
    """
    charts: list[dict[str, Any]] = []
    without: list[str] = []
    for variant in variants:
        if not variant.uses_content:
            continue
        cosines = ((run, None if run.embeddings is None else pair_cosines(run.embeddings)) for run in variant.runs)
        run, found = next(((run, pair) for run, pair in cosines if pair is not None), (variant.runs[0], None))
        if found is None:
            without.append(run.name)
        else:
            charts.append({"name": run.name, **_histogram(*found)})
    return {"charts": charts, "without": without}


def pair_cosines(vectors: Embeddings) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the cosine of each item's content with its own ID and with that of another item, both [N].

    Each ID serves once as the other one, that of the next item in a seeded order. None where the run has kept no
    vectors of its alignment loss, or fewer than two items have both sides.
    """
    if vectors.aligned_content is None or vectors.aligned_id is None:
        return None
    content_NE, id_NE = (_unit(side) for side in (vectors.aligned_content, vectors.aligned_id))
    usable = vectors.present & vectors.known & np.isfinite(content_NE).all(1) & np.isfinite(id_NE).all(1)
    rows = np.random.default_rng(SEED).permutation(np.flatnonzero(usable))
    if len(rows) < 2:
        return None
    content_NE, id_NE = content_NE[rows], id_NE[rows]
    return (content_NE * id_NE).sum(1), (content_NE * np.roll(id_NE, 1, axis=0)).sum(1)


def _unit(vector_NE: NDArray) -> NDArray[np.float64]:
    exact_NE = vector_NE.astype(np.float64)
    return exact_NE / np.maximum(np.linalg.norm(exact_NE, axis=1, keepdims=True), 1e-12)


def _histogram(matched_N: NDArray[np.float64], other_N: NDArray[np.float64]) -> Mapping[str, Any]:
    low, high = min(matched_N.min(), other_N.min()), max(matched_N.max(), other_N.max())
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    lines = [
        Line(name, series, middles, (np.histogram(cosine_N, edges)[0] / len(cosine_N)).tolist())
        for series, (name, cosine_N) in enumerate((("with another item's ID", other_N), ("with its own ID", matched_N)))
    ]
    return {
        "chart": line_chart(lines, "cosine of content and ID", "share of pairs"),
        "items": len(matched_N),
        "matched": float(matched_N.mean()),
        "other": float(other_N.mean()),
        "above": _share_above(matched_N, other_N),
    }


def _share_above(matched_N: NDArray[np.float64], other_N: NDArray[np.float64]) -> float:
    """Return the share of pairs of a matched and another cosine in which the matched one is larger; ties count half."""
    count = len(matched_N)
    ranks = rankdata(np.concatenate([matched_N, other_N]))[:count]
    return float((ranks.sum() - count * (count + 1) / 2) / count**2)
