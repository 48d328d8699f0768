"""Raw ids are numbers that never change, never 0 and never TorchRec's mark of a free row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw_ids import stable_ids, user_ids


def test_ids_are_the_same_for_ever() -> None:
    ids = stable_ids(pa.chunked_array([["", "B00005N5PF", "1"], ["B00005N5PF", "ü"]]))
    assert ids[:3].tolist() == [0, 5667054212956032330, 8518482412311870711]
    assert ids[3] == ids[1]
    assert len(set(ids.tolist())) == 4


def test_ids_are_spread_evenly_over_their_range() -> None:
    ids = stable_ids(pa.chunked_array([[str(place) for place in range(4001)]]))[1:]
    assert ids.min() > 0
    assert ids.max() < 2**63 - 1
    counts = np.histogram(ids.astype(float), bins=4, range=(0, 2.0**63))[0]
    assert counts.min() > 900


def test_a_stream_of_raw_users_differs_in_the_user_only(tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    fixed, raw = (
        next(iter(BatchStream(data, "validation", batch_size=64, max_history=5, raw_users=raw)))
        for raw in (False, True)
    )
    assert torch.equal(raw.sparse["user"].values(), torch.from_numpy(user_ids(data))[raw.user])
    for name in fixed.sparse.keys()[1:]:
        assert torch.equal(fixed.sparse[name].values(), raw.sparse[name].values())
