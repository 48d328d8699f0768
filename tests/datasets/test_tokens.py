import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.tiny_encoders import TinyDeepEncoder
from torchrec_em3.datasets.tokens import TokenStore, TokenSummary, write_tokens
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.registry import ENCODERS, NoOptions


@ENCODERS.register("test_number")
class NumberEncoder:
    """Text "7" becomes tokens full of 7s, one token a character; remembers the size of its batches."""

    modality, dim, max_tokens, source = "text", 3, 4, "numbers 1.0"

    def __init__(self, options: NoOptions) -> None:
        self.batches: list[int] = []

    def encode(self, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.batches.append(len(inputs))
        tokens = torch.zeros(len(inputs), 4, 3)
        lengths = torch.tensor([min(len(text), 4) for text in inputs])
        for row, text in enumerate(inputs):
            tokens[row, : int(lengths[row])] = float(text)
        return tokens, lengths


class ColourEncoder:
    """A picture becomes one token, its mean colour."""

    modality, dim, max_tokens, source = "image", 3, 1, "colours"

    def encode(self, inputs: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        means = [np.asarray(image, dtype=np.float32).mean((0, 1)) / 255 for image in inputs]
        return torch.from_numpy(np.stack(means))[:, None], torch.ones(len(inputs), dtype=torch.int64)


def write_numbers(folder: Path, inputs: Sequence[str | None], batch_size: int = 2) -> TokenSummary:
    return write_tokens(folder / "text", NumberEncoder(NoOptions()), inputs, batch_size)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Texts in rows 1, 2, 4; pictures in rows 1 and 3; row 0 unknown."""
    write_numbers(tmp_path, ["", "7", "12", None, "12345"])
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (9, 9), (0, 0, 255)).save(tmp_path / "blue.png")
    inputs = [None, tmp_path / "red.png", tmp_path / "gone.png", tmp_path / "blue.png", None]
    write_tokens(tmp_path / "image", ColourEncoder(), inputs)
    return TokenStore(tmp_path)


def test_fetch_returns_what_was_written(store: TokenStore) -> None:
    assert store.token_dims == {"image": 3, "text": 3}
    assert store.token_counts == {"image": 1, "text": 4}
    assert store.num_rows == 5
    fetched = store.fetch(torch.tensor([4, 0, 1, 3, 4]))
    text, image = fetched["text"], fetched["image"]
    assert text.tokens_UTD.dtype == torch.float32
    assert text.valid_UT.tolist() == [[True] * 4, [False] * 4, [True, False, False, False], [False] * 4, [True] * 4]
    assert torch.equal(text.tokens_UTD[2], torch.tensor([[7.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]))
    torch.testing.assert_close(text.tokens_UTD[0], torch.full((4, 3), float(np.float16(12345))))
    assert image.valid_UT.flatten().tolist() == [False, False, True, True, False]
    assert image.tokens_UTD[3, 0].tolist() == [0.0, 0.0, 1.0]
    assert image.tokens_UTD[2, 0].tolist() == [1.0, 0.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(items=st.lists(st.integers(0, 199), max_size=300))
def test_fetch_equals_plain_indexing(tmp_path_factory: pytest.TempPathFactory, items: list[int]) -> None:
    folder = tmp_path_factory.mktemp("store")
    write_numbers(folder, ["", *(str(row) if row % 3 else None for row in range(1, 200))], batch_size=64)
    tokens = np.load(folder / "text" / "tokens.npy")
    lengths, present = np.load(folder / "text" / "lengths.npy"), np.load(folder / "text" / "present.npy")
    fetched = TokenStore(folder).fetch(torch.tensor(items, dtype=torch.int64))["text"]
    expected = (np.arange(4) < lengths[items][:, None]) & present[items][:, None]
    longest = int(expected.sum(1).max(initial=0)) or 4
    assert np.array_equal(fetched.tokens_UTD.numpy(), tokens[items, :longest].astype(np.float32))
    assert np.array_equal(fetched.valid_UT.numpy(), expected[:, :longest])


def test_a_fetch_is_as_wide_as_its_longest_item(store: TokenStore) -> None:
    for items, width in (([1, 2], 2), ([1, 4], 4), ([0, 3], 4)):
        assert store.fetch(torch.tensor(items))["text"].valid_UT.shape[1] == width


def test_the_result_is_ours_to_change(store: TokenStore) -> None:
    store.fetch(torch.tensor([1]))["text"].tokens_UTD.fill_(9.0)
    assert store.fetch(torch.tensor([1]))["text"].tokens_UTD[0, 0, 0] == 7.0


def test_other_devices_and_integers(store: TokenStore) -> None:
    assert store.fetch(torch.tensor([1, 2], dtype=torch.int32))["text"].tokens_UTD[1, 0, 0] == 12.0
    elsewhere = store.fetch(torch.tensor([1, 2]), device="meta")["text"]
    assert elsewhere.tokens_UTD.device.type == "meta"
    assert elsewhere.tokens_UTD.dtype == torch.float32
    assert elsewhere.valid_UT.shape == (2, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same(store: TokenStore) -> None:
    here, there = store.fetch(torch.tensor([4, 1])), store.fetch(torch.tensor([4, 1], device="cuda"))
    for name, expected in here.items():
        assert there[name].tokens_UTD.is_cuda
        assert torch.equal(there[name].tokens_UTD.cpu(), expected.tokens_UTD)
        assert torch.equal(there[name].valid_UT.cpu(), expected.valid_UT)


@pytest.mark.parametrize(("item", "shown"), [(-1, "-1"), (5, "5"), (2**40, str(2**40))])
def test_rows_outside_are_refused(store: TokenStore, item: int, shown: str) -> None:
    with pytest.raises(DataError, match=rf"item row {shown} is outside the token store .*rows 0 to 4"):
        store.fetch(torch.tensor([1, item]))


def test_counts_leave_row_0_out(tmp_path: Path) -> None:
    summary = write_numbers(tmp_path, ["", "7", "", " \n\x00", None, "3"])
    assert summary == TokenSummary(present=2, missing=3, broken=0)
    assert np.load(tmp_path / "text" / "present.npy").tolist() == [False, True, False, False, False, True]


def test_broken_and_missing_pictures_are_masked_and_counted(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    (tmp_path / "page.png").write_text("<html>404</html>", encoding="utf-8")
    inputs = [None, *(tmp_path / name for name in ("red.png", "half.png", "page.png", "gone.png")), None]
    summary = write_tokens(tmp_path / "image", ColourEncoder(), inputs)
    assert (summary.present, summary.missing, summary.broken) == (1, 2, 2)
    assert summary.reasons["a web page, not a picture"] == 1
    assert summary.reasons["no such file"] == 1
    valid = TokenStore(tmp_path).fetch(torch.arange(6))["image"].valid_UT
    assert valid.flatten().tolist() == [False, True, False, False, False, False]


def test_what_fp16_cannot_hold_is_broken(tmp_path: Path) -> None:
    summary = write_numbers(tmp_path, ["", "7", "70000", "nan", "8"], batch_size=3)
    assert (summary.present, summary.missing, summary.broken) == (2, 0, 2)
    fetched = TokenStore(tmp_path).fetch(torch.arange(5))["text"]
    assert fetched.tokens_UTD.isfinite().all()
    assert fetched.valid_UT.any(1).tolist() == [False, True, False, False, True]


def test_all_missing_and_no_items(tmp_path: Path) -> None:
    assert write_numbers(tmp_path / "a", ["", None, ""]) == TokenSummary(0, 2, 0)
    assert not TokenStore(tmp_path / "a").fetch(torch.arange(3))["text"].valid_UT.any()
    assert write_numbers(tmp_path / "b", [""]) == TokenSummary(0, 0, 0)


def test_the_catalogue_is_encoded_in_batches(tmp_path: Path) -> None:
    encoder = NumberEncoder(NoOptions())
    write_tokens(tmp_path / "text", encoder, ["", *"12345"], batch_size=2)
    assert encoder.batches == [1, 2, 2]


def test_meta_names_the_registered_encoder(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["", "7"])
    meta = json.loads((tmp_path / "text" / "meta.json").read_text(encoding="utf-8"))
    assert meta == {"encoder": "test_number", "source": "numbers 1.0", "dim": 3, "max_tokens": 4}


def test_row_0_must_be_unknown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0 of the catalogue is 'unknown' but has text '7'"):
        write_numbers(tmp_path, ["7", "8"])


def test_an_encoder_that_breaks_its_word(tmp_path: Path) -> None:
    encoder = NumberEncoder(NoOptions())
    encoder.dim = 5
    with pytest.raises(ConfigError, match=r"test_number returned tokens \(1, 4, 3\).*\(1, 4, 5\)"):
        write_tokens(tmp_path / "text", encoder, ["", "7"])


def test_modalities_can_be_chosen(store: TokenStore) -> None:
    folder = store._folder
    assert list(TokenStore(folder, ["text"]).fetch(torch.tensor([1]))) == ["text"]
    assert TokenStore(folder, []).fetch(torch.tensor([], dtype=torch.int64)) == {}
    with pytest.raises(DataError, match=r"no tokens for modality 'sound', only \['image', 'text'\]"):
        TokenStore(folder, ["sound"])


def test_another_process_gets_the_folder_not_the_tokens(store: TokenStore) -> None:
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).fetch(torch.tensor([2]))["text"].valid_UT, torch.tensor([[True, True]]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def remove(path: Path) -> None:
    path.unlink()


def fill_with_objects(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def shorten(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize("name", ["tokens.npy", "lengths.npy", "present.npy"])
@pytest.mark.parametrize("damage", [truncate, remove, fill_with_objects, shorten])
def test_damaged_stores_are_refused(tmp_path: Path, name: str, damage: object) -> None:
    write_numbers(tmp_path, ["", "7", "8", "9"])
    damage(tmp_path / "text" / name)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"token store .*text.* run em3 prepare again"):
        TokenStore(tmp_path)


def test_modalities_of_different_catalogues_are_refused(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["", "7"])
    write_tokens(tmp_path / "other", NumberEncoder(NoOptions()), ["", "7", "8"])
    with pytest.raises(DataError, match="modalities differ in rows"):
        TokenStore(tmp_path)


def test_the_present_flag_rules_over_the_length(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["", "777", "888"])
    np.save(tmp_path / "text" / "present.npy", np.array([False, True, False]))
    valid = TokenStore(tmp_path).fetch(torch.arange(3))["text"].valid_UT
    assert valid.sum(1).tolist() == [0, 3, 0]


@pytest.mark.parametrize("cut", [0, 2])
def test_a_store_at_a_cut_holds_what_the_layers_above_read(tmp_path: Path, cut: int) -> None:
    encoder = TinyDeepEncoder()
    write_tokens(tmp_path / "text", encoder, ["", "a cat", "", "the dog sleeps"], cut=cut)
    meta = json.loads((tmp_path / "text" / "meta.json").read_text(encoding="utf-8"))
    assert meta == {
        "encoder": "tiny_deep_text", "source": "tiny_deep", "dim": 6 if cut else 1, "max_tokens": 4,
        "dtype": "float16" if cut else "int32", "cut": cut, "layers": 3, "encoder_dim": 6, "encoder_tokens": 4,
    }  # fmt: skip
    rows, valid = TokenStore(tmp_path).fetch(torch.tensor([3, 2, 1]))["text"]
    assert rows.dtype == (torch.float32 if cut else torch.int32)
    assert valid.sum(1).tolist() == [3, 0, 2]
    expected, _ = encoder.prefix(cut).encode(["the dog sleeps", "a cat"])
    expected = expected[:, :3]
    torch.testing.assert_close(rows[[0, 2]], expected.half().float() if cut else expected, rtol=0, atol=0)


def test_a_store_of_another_type_than_it_says_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "text", TinyDeepEncoder(), ["", "a cat"], cut=0)
    np.save(tmp_path / "text" / "tokens.npy", np.zeros((2, 4, 1), dtype=np.float16))
    with pytest.raises(DataError, match=r"tokens are float16 .* say int32"):
        TokenStore(tmp_path)
