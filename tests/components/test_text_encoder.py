import hashlib
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

from tests.components.encoder_contract import check_encoder
from torchrec_em3.components.encoders import text as text_module
from torchrec_em3.components.encoders.text import HFTextEncoder, HFTextOptions, MiniLMEncoder, MiniLMOptions
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import ENCODERS, NoOptions

TEXTS = [
    "A cat sleeps on the sofa.",
    "film",
    "",
    "word " * 200,
    "The kitten is napping on the couch, as it does every day when the sun comes in through the window.",
    "Ein Text mit Umlauten: äöü, und 日本語",
    *(f"item number {number} of a series that fills a chunk" for number in range(20)),
]


@ENCODERS.register("test_word_hash")
class WordHashEncoder:
    """A user's encoder: a fixed code for each word."""

    modality, dim, max_tokens, source = "text", 8, 5, "word hash"

    def __init__(self, options: NoOptions) -> None:
        pass

    def encode(self, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens, lengths = torch.zeros(len(inputs), 5, 8), torch.ones(len(inputs), dtype=torch.int64)
        for row, text in enumerate(inputs):
            words = text.split()[:5]
            lengths[row] = max(1, len(words))
            for place, word in enumerate(words):
                tokens[row, place] = torch.tensor(list(hashlib.sha256(word.encode()).digest()[:8])) / 128 - 1
        return tokens, lengths


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder(MiniLMOptions())


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without pooler, whose tokenizer has neither padding nor special tokens at the ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt")
    vocabulary = {word: index for index, word in enumerate(["<end>", "a", "cat", "sleeps", "film", "word"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=6, n_embd=12, n_layer=1, n_head=2, n_positions=16)).save_pretrained(folder)
    return folder


def test_minilm_keeps_the_contract(minilm: MiniLMEncoder) -> None:
    assert (minilm.dim, minilm.max_tokens, minilm.modality) == (384, 32, "text")
    assert "53aa5117" in minilm.source
    check_encoder(minilm, TEXTS)


def test_a_users_encoder_keeps_the_contract() -> None:
    part = ENCODERS.get("test_word_hash")
    check_encoder(part.build(part.options()), TEXTS[:6])


def test_lengths_follow_the_texts_and_are_cut(minilm: MiniLMEncoder) -> None:
    _, lengths = minilm.encode(TEXTS[:4])
    assert lengths.tolist() == [9, 3, 2, 32]


def test_no_texts_give_no_rows(minilm: MiniLMEncoder) -> None:
    tokens, lengths = minilm.encode([])
    assert tokens.shape == (0, 32, 384)
    assert lengths.shape == (0,)


def test_huge_and_odd_texts_are_cheap_and_finite(minilm: MiniLMEncoder) -> None:
    odd = ["x" * 10_000_000, "a\0b\x07c\udcff", " \n\t", "🎬" * 500]
    tokens, lengths = minilm.encode(odd)
    assert tokens.isfinite().all()
    assert lengths.max() <= 32


def test_meaning_is_near_meaning(minilm: MiniLMEncoder) -> None:
    tokens, lengths = minilm.encode(
        ["A cat is sleeping on the sofa.", "A kitten naps on the couch.", "The stock market fell sharply today."]
    )
    mean = torch.nn.functional.normalize(tokens.sum(1) / lengths[:, None], dim=-1)
    cosine = mean @ mean.T
    assert cosine[0, 1] > 0.6
    assert cosine[0, 2] < 0.2


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    MiniLMEncoder(MiniLMOptions(max_tokens=8))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors have sha256 53aa5117"):
        MiniLMEncoder(MiniLMOptions())


def test_a_local_folder_serves_as_model(tiny_bert: Path) -> None:
    encoder = HFTextEncoder(HFTextOptions(model=str(tiny_bert), max_tokens=12))
    assert (encoder.dim, encoder.max_tokens, encoder.source) == (16, 12, str(tiny_bert))
    check_encoder(encoder, TEXTS[:6])
    assert not any("pooler" in name for name, _ in encoder._model.named_parameters())


def test_a_model_without_padding_token_works(tiny_gpt: Path) -> None:
    encoder = HFTextEncoder(HFTextOptions(model=str(tiny_gpt), max_tokens=6))
    check_encoder(encoder, ["a cat sleeps", "film", "", "word word word word word word word"])
    assert encoder.encode(["a cat", ""])[1].tolist() == [2, 1]


def test_too_many_tokens_for_the_model(tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens of encoder 'hf_text' is 21, .* at most 20"):
        HFTextEncoder(HFTextOptions(model=str(tiny_bert), max_tokens=21))


def test_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'nobody/no-such-model'.*give a local folder.*unset HF_HUB_OFFLINE"):
        HFTextEncoder(HFTextOptions(model="nobody/no-such-model"))
    with pytest.raises(ConfigError, match=r"no folder '\./gone'"):
        HFTextEncoder(HFTextOptions(model="./gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot load"):
        HFTextEncoder(HFTextOptions(model=str(tmp_path / "empty")))


@pytest.mark.parametrize("options", [MiniLMOptions, HFTextOptions])
def test_bad_lengths_are_refused(options: type[MiniLMOptions]) -> None:
    with pytest.raises(ConfigError, match="max_tokens is 1"):
        options(max_tokens=1)
