"""Reduction of tokens: against a plain eigendecomposition, what is kept, what stays untouched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets import token_reduction
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.token_reduction import reduce_tokens
from torchrec_em3.datasets.tokens import TokenStore

WIDTH, COUNT, ROWS = 12, 5, 40


def write_store(folder: Path, rank: int = WIDTH) -> np.ndarray:
    """Write tokens of the given rank with a decaying spectrum; return them as float32, zero where invalid."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))[0][:rank] * 0.6 ** np.arange(rank)[:, None]
    tokens = (random.standard_normal((ROWS, COUNT, rank)) @ directions).astype(np.float16)
    lengths = random.integers(1, COUNT + 1, ROWS).astype(np.int32)
    present = np.arange(ROWS) % 4 != 0
    lengths[~present] = 0
    tokens[np.arange(COUNT) >= lengths[:, None]] = 0
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "present.npy", present)
    meta = {"encoder": "e", "source": "s", "dim": WIDTH, "max_tokens": COUNT}
    (folder / "meta.json").write_text(json.dumps(meta))
    return tokens.astype(np.float32)


def test_keeps_the_leading_directions(tmp_path: Path) -> None:
    before = write_store(tmp_path / "text")
    kept = reduce_tokens(tmp_path / "text", 3)
    moments = np.einsum("ntd,nte->de", before, before)
    values, vectors = np.linalg.eigh(moments)
    assert kept == pytest.approx(values[-3:].sum() / values.sum(), rel=1e-4)
    assert 0.5 < kept < 1
    after = np.load(tmp_path / "text" / "tokens.npy").astype(np.float32)
    leading = vectors[:, -3:]
    np.testing.assert_allclose(
        after @ np.load(tmp_path / "text" / "reduction.npy"), before @ leading @ leading.T, atol=5e-3
    )


def test_nothing_is_lost_where_the_tokens_have_that_rank(tmp_path: Path) -> None:
    before = write_store(tmp_path / "text", rank=4)
    assert reduce_tokens(tmp_path / "text", 4) == pytest.approx(1, abs=1e-5)
    after = np.load(tmp_path / "text" / "tokens.npy").astype(np.float32)
    flat_before, flat_after = before.reshape(-1, WIDTH), after.reshape(-1, 4)
    np.testing.assert_allclose(flat_after @ flat_after.T, flat_before @ flat_before.T, atol=2e-2)


def test_the_store_reads_as_before_but_for_the_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_reduction, "BLOCK_ITEMS", 7)
    write_store(tmp_path / "text")
    items = torch.arange(ROWS)
    valid_UT = TokenStore(tmp_path).fetch(items)["text"].valid_UT
    reduce_tokens(tmp_path / "text", 3)
    tokens_UTD, valid_after_UT = TokenStore(tmp_path).fetch(items)["text"]
    assert tokens_UTD.shape == (ROWS, COUNT, 3)
    assert torch.equal(valid_after_UT, valid_UT)
    assert not tokens_UTD[~valid_UT].any()
    meta = json.loads((tmp_path / "text" / "meta.json").read_text())
    assert (meta["dim"], meta["encoder_dim"]) == (3, WIDTH)


def test_prepare_reduces_wider_tokens(tmp_path: Path) -> None:
    options = PrepareOptions(text_encoder="tiny_text", image_encoder="none", token_dim=5)
    meta = prepare(make_raw(), tmp_path / "data", options)
    assert [meta["modalities"]["text"][key] for key in ("dim", "encoder_dim")] == [5, 8]
    data = PreparedData.open(tmp_path / "data")
    store = TokenStore(data.tokens_folder)
    assert (store.token_dims, store.token_counts) == ({"text": 5}, {"text": 6})
    assert store.fetch(torch.tensor([1]))["text"].tokens_UTD.shape[::2] == (1, 5)
    data.verify()
