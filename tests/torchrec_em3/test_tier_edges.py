"""Rows whose histogram of similarities hangs on rounding, against a plain loop over the split."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from torchrec_em3 import tier_edges
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.export_tables import CatalogueContent

MAX_HISTORY = 5


def run_on(data: PreparedData, histogram: bool) -> Any:
    """What is read of a trained run."""
    similarity = SimpleNamespace(histogram=histogram)
    model = SimpleNamespace(content=SimpleNamespace(similarity=similarity), item_rows=data.item_rows)
    config = SimpleNamespace(loader=SimpleNamespace(max_history=MAX_HISTORY))
    return SimpleNamespace(data=data, config=config, sharded=SimpleNamespace(model=model))


def expected_rows(data: PreparedData, content: CatalogueContent, margin: float) -> list[bool]:
    columns = data.split_rows("validation")
    assert content.history is not None
    assert content.history.valid_V is not None
    found = []
    for user, item, end in zip(columns["user"], columns["item"], columns["history_end"], strict=True):
        first = max(int(data.history_offsets[user]), int(end) - MAX_HISTORY)
        near = False
        for seen in data.history_items[first:end]:
            cosine = functional.cosine_similarity(content.target_ID[item], content.history.rows_VD[seen], dim=0)
            distance = min(abs(float(cosine) - (edge / 10 - 1)) for edge in range(1, 20))
            near |= distance <= margin and bool(content.history.valid_V[seen])
        found.append(near)
    return found


def test_rows_are_those_with_a_cosine_at_an_edge(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, margin = PreparedData.open(tiny_data), 2e-3
    torch.manual_seed(0)
    rows_ID, valid_I = torch.randn(data.item_rows, 3, dtype=torch.float64), torch.rand(data.item_rows) < 0.8
    content = CatalogueContent(torch.randn_like(rows_ID), HistoryItems(rows_ID, valid_I))
    monkeypatch.setattr(tier_edges, "MARGIN", margin)
    monkeypatch.setattr(tier_edges, "ROWS_AT_A_TIME", 64)
    near_B = tier_edges.rows_at_tier_edges(run_on(data, histogram=True), content)
    assert near_B.tolist() == expected_rows(data, content, margin)
    assert 0 < near_B.sum() < len(near_B)
    assert not tier_edges.rows_at_tier_edges(run_on(data, histogram=False), None).any()
