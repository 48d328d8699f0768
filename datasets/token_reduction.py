"""Narrower tokens: a fixed linear map onto their leading directions, learnt from the catalogue itself.

Encoders write tokens several hundred wide, and reading and projecting them is most of what a content tower costs. A
third of the width is a third of the store and of that cost.

Shape letters: N catalogue rows, T tokens of an item, I width of the encoder, R reduced width, n tokens of a sample.
"""

import json
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from sklearn.decomposition import TruncatedSVD

__all__ = ["project_tokens", "reduce_tokens"]

SAMPLE_ITEMS = 1000
"""Items whose tokens choose the directions."""
BLOCK_ITEMS = 1024
"""Items projected at a time."""


def reduce_tokens(folder: Path, dim: int, seed: int = 0) -> float:
    """Replace the tokens of one modality by their coordinates along their `dim` leading directions [ours].

    The directions are the uncentred principal components of a sample of items, so that an inner product of two tokens
    stays what it was but for what is left out. They are kept in `reduction.npy`, for items that come later.

    Args:
        folder: `.../tokens/<modality>` as `write_tokens` left it.
        dim: Width R, smaller than the encoder's.
        seed: Seed of the sample.

    Returns:
        Share of the sample's squared norm that is kept, in [0, 1].
    """
    tokens_NTI = np.load(folder / "tokens.npy", mmap_mode="r")
    sample_nI = _sample(tokens_NTI, folder, seed)
    svd = TruncatedSVD(n_components=dim, random_state=seed).fit(sample_nI)
    directions_RI = svd.components_.astype(np.float32)
    project_tokens(folder, directions_RI)
    return float(np.square(sample_nI @ directions_RI.T).sum() / np.square(sample_nI).sum())


def project_tokens(folder: Path, directions_RI: np.ndarray) -> None:
    """Replace the tokens of one modality by their coordinates along given directions, and keep the directions beside.

    Args:
        folder: `.../tokens/<modality>` as `write_tokens` left it.
        directions_RI: One direction a row, float32.
    """
    tokens_NTI = np.load(folder / "tokens.npy", mmap_mode="r")
    shape = (*tokens_NTI.shape[:2], len(directions_RI))
    reduced_NTR = open_memmap(folder / "reduced.npy", mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(tokens_NTI), BLOCK_ITEMS):
        block = slice(start, start + BLOCK_ITEMS)
        reduced_NTR[block] = tokens_NTI[block].astype(np.float32) @ directions_RI.T
    reduced_NTR.flush()
    (folder / "reduced.npy").replace(folder / "tokens.npy")
    np.save(folder / "reduction.npy", directions_RI)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta |= {"dim": len(directions_RI), "encoder_dim": tokens_NTI.shape[2]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _sample(tokens_NTI: np.ndarray, folder: Path, seed: int) -> np.ndarray:
    """Return the valid tokens of a seeded sample of the items that have any."""
    present = np.flatnonzero(np.load(folder / "present.npy"))
    chosen = np.sort(np.random.default_rng(seed).permutation(present)[:SAMPLE_ITEMS])
    lengths = np.load(folder / "lengths.npy")[chosen]
    valid = np.arange(tokens_NTI.shape[1]) < lengths[:, None]
    return tokens_NTI[chosen][valid].astype(np.float32)
