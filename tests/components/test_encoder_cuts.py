"""An encoder that is cut gives the tokens of the whole one, wherever it is cut; others say that they cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.components.encoder_contract import check_cuts, check_encoder
from tests.components.test_text_encoder import TEXTS, WordHashEncoder, tiny_bert, tiny_gpt  # noqa: F401  (fixtures)
from tests.tiny_encoders import TinyDeepEncoder
from torchrec_em3.components.encoders.cut import check_cut
from torchrec_em3.components.encoders.image import EfficientNetEncoder, EfficientNetOptions
from torchrec_em3.components.encoders.text import HFTextEncoder, HFTextOptions, MiniLMEncoder, MiniLMOptions
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import NoOptions


def test_a_users_encoder_is_cut() -> None:
    encoder = TinyDeepEncoder()
    check_encoder(encoder, TEXTS[:2] + TEXTS[4:6])
    check_cuts(encoder, TEXTS[:6], cuts=[0, 1, 2])


def test_a_local_folder_is_cut(tiny_bert: Path) -> None:  # noqa: F811
    check_cuts(HFTextEncoder(HFTextOptions(model=str(tiny_bert), max_tokens=12)), TEXTS[:6], cuts=[0, 1])


def test_roberta_is_cut(tiny_bert: Path, tmp_path: Path) -> None:  # noqa: F811
    """Its positions depend on the filler, which is not number 0."""
    from transformers import BertTokenizer, RobertaConfig, RobertaModel

    tokenizer = BertTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    check_cuts(HFTextEncoder(HFTextOptions(model=str(tmp_path), max_tokens=12)), TEXTS[:6], cuts=[0, 1])


def test_minilm_is_cut() -> None:
    encoder = MiniLMEncoder(MiniLMOptions(max_tokens=12))
    assert encoder.layers == 6
    check_cuts(encoder, TEXTS[:6], cuts=[0, 4])


def test_efficientnet_is_cut() -> None:
    encoder = EfficientNetEncoder(EfficientNetOptions(image_size=64))
    assert encoder.layers == 16
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (90, 60 + side, 3), dtype=np.uint8)) for side in range(3)]
    check_cuts(encoder, pictures, cuts=[0, 1, 11, 15])
    assert encoder.prefix(11).dim == 112
    assert encoder.prefix(11).max_tokens == 16


def test_what_cannot_be_cut_says_so(tiny_gpt: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"--text_cut 1: encoder 'word_hash' \(word hash\) cannot be cut; leave"):
        check_cut(WordHashEncoder(NoOptions()), "word_hash", 1)
    with pytest.raises(ConfigError, match=r"encoder 'hf_text' .* cannot be cut"):
        check_cut(HFTextEncoder(HFTextOptions(model=str(tiny_gpt), max_tokens=6)), "hf_text", 0)


@pytest.mark.parametrize("cut", [-1, 3])
def test_a_cut_outside_the_layers_is_refused(cut: int) -> None:
    with pytest.raises(ConfigError, match=rf"--text_cut is {cut}, must be from 0 \(raw inputs\) to 2: .* has 3 layers"):
        check_cut(TinyDeepEncoder(), "tiny_deep_text", cut)
