"""Raw ids as numbers: a stable hash of the publisher's ids, for tables that have no vocabulary.

Shape letters: R rows.
"""

import hashlib

import numpy as np
import pyarrow as pa

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.recent_events import ShardRows

__all__ = ["item_ids", "stable_ids", "user_ids"]

_RANGE = 2**63 - 2
"""Ids lie in 1.._RANGE: 0 is "unknown", and TorchRec marks free rows by 2^63 - 1."""


def stable_ids(raw_id: pa.ChunkedArray) -> np.ndarray:
    """Return an id in 1..2^63 - 2 for each raw id, int64 [R], evenly spread; 0 for row 0, "unknown".

    It is BLAKE2b of the UTF-8 string, so the same in every process, on every machine and in later data. Two of a
    billion ids are equal with a probability of 5 %.
    """
    digests = (hashlib.blake2b(value.encode(), digest_size=8).digest() for value in raw_id.to_pylist()[1:])
    number_R = np.frombuffer(b"".join(digests), dtype="<u8") % np.uint64(_RANGE) + np.uint64(1)
    return np.concatenate([np.zeros(1, dtype=np.int64), number_R.astype(np.int64)])


def user_ids(data: PreparedData | ShardRows) -> np.ndarray:
    """Return the id of each user row, int64."""
    return stable_ids(data.users["raw_id"])


def item_ids(data: PreparedData) -> np.ndarray:
    """Return the id of each catalogue row, int64."""
    return stable_ids(data.items["raw_id"])
