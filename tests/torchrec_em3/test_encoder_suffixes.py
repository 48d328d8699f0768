"""Encoders trained above a cut: what is trained, its gradients, and what does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_encoders import TinyDeepEncoder
from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.encoders.image import EfficientNetEncoder, EfficientNetOptions
from torchrec_em3.components.encoders.text import MiniLMEncoder, MiniLMOptions
from torchrec_em3.config import EncodersConfig, EncoderTraining
from torchrec_em3.encoder_suffixes import EncoderSuffixes, build_suffixes, check_bfloat16, select_trained
from torchrec_em3.errors import ConfigError
from torchrec_em3.schema import ModalitySpec

TEXTS = ["a cat", "the dog sleeps here", "film", "one two three"]
RECORDED = {
    "encoder": "tiny_deep_text", "source": "tiny_deep", "dim": 6, "max_tokens": 4, "dtype": "float16", "cut": 1,
    "layers": 3, "encoder_dim": 6, "encoder_tokens": 4,
}  # fmt: skip


def suffixes(cut: int, training: str, layers: int = 0, **options: Any) -> EncoderSuffixes:
    torch.manual_seed(0)
    wanted = EncoderTraining(training=training, layers=layers, **options)  # type: ignore[arg-type]
    return EncoderSuffixes(
        {"text": select_trained(TinyDeepEncoder().suffix(cut), wanted)}, {"text": ModalitySpec("text", 6, 4)}, False
    )


def stored(cut: int, texts: list[str] = TEXTS) -> ModalityTokens:
    """What the store holds: the texts, and an item without text at the end."""
    rows, lengths = TinyDeepEncoder().prefix(cut).encode([*texts, ""])
    lengths[-1] = 0
    return ModalityTokens(rows, torch.arange(rows.shape[1]) < lengths[:, None])


def trained(module: nn.Module) -> list[str]:
    return [name for name, weight in module.named_parameters() if weight.requires_grad]


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_the_tokens_are_the_encoders_own(cut: int) -> None:
    tokens, valid = suffixes(cut, "frozen")({"text": stored(cut)})["text"]
    expected, lengths = TinyDeepEncoder().encode(TEXTS)
    torch.testing.assert_close(tokens[:-1], expected)
    assert valid.sum(1).tolist() == [*lengths.tolist(), 0]
    assert not tokens[-1].any()


def test_modalities_without_a_cut_pass() -> None:
    image = ModalityTokens(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    assert suffixes(0, "frozen")({"image": image})["image"] is image


def test_what_is_trained() -> None:
    assert trained(suffixes(0, "frozen")) == []
    assert trained(suffixes(0, "last_n", 1)) == [f"suffixes.text.layers.2.{name}" for name in ("weight", "bias")]
    assert len(trained(suffixes(0, "last_n"))) == 6, "the words are below the first layer"
    assert len(trained(suffixes(0, "full"))) == 7
    adapters = trained(suffixes(1, "lora", 1))
    assert len(adapters) == 2
    assert all("layers.1.lora_" in name for name in adapters)


def test_adapters_go_to_attention_mlp_and_pointwise_convolutions() -> None:
    lora = EncoderTraining(training="lora")
    text = trained(select_trained(MiniLMEncoder(MiniLMOptions(max_tokens=8)).suffix(5), lora))
    found = {name.split("layer.0.")[1].split(".lora_")[0] for name in text}
    attention = {f"attention.self.{name}" for name in ("query", "key", "value")} | {"attention.output.dense"}
    assert found == attention | {"intermediate.dense", "output.dense"}
    image = trained(select_trained(EfficientNetEncoder(EfficientNetOptions(image_size=32)).suffix(15), lora))
    assert {name.split("layers.0.")[1].split(".lora_")[0] for name in image} == {"expand.conv", "project.conv"}


@pytest.mark.parametrize("training", ["last_n", "lora"])
def test_gradients_are_those_of_finite_differences(training: str) -> None:
    module = suffixes(1, training).double()
    for name, weight in module.named_parameters():
        if "lora_B" in name:  # zero at the start, which hides the gradient of A
            nn.init.normal_(weight, std=0.3)
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def loss(*_: Tensor) -> Tensor:
        return module({"text": stored(1)})["text"].tokens_UTD.square().sum()

    assert torch.autograd.gradcheck(loss, weights)


def test_a_cut_gives_the_loss_and_gradients_of_no_cut() -> None:
    cut, whole = suffixes(2, "last_n"), suffixes(0, "last_n", 1)
    losses = [module({"text": stored(at)})["text"].tokens_UTD.sin().sum() for module, at in ((cut, 2), (whole, 0))]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, [weight for weight in module.parameters() if weight.requires_grad])
        for loss, module in zip(losses, (cut, whole), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_a_non_zero_adapter_changes_the_output_in_evaluation() -> None:
    module, plain = suffixes(1, "lora").eval(), suffixes(1, "frozen")
    before = module({"text": stored(1)})["text"].tokens_UTD
    torch.testing.assert_close(before, plain({"text": stored(1)})["text"].tokens_UTD)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(weight)
    assert (module({"text": stored(1)})["text"].tokens_UTD - before).abs().max() > 0.1


def test_it_stays_in_evaluation_mode() -> None:
    module = suffixes(1, "lora").train()
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("texts", [[], TEXTS])
def test_every_weight_gets_a_gradient_even_without_a_text(texts: list[str]) -> None:
    module = suffixes(0, "full")
    rows, valid = stored(0)
    valid[len(texts) :] = False
    module({"text": ModalityTokens(rows, valid)})["text"].tokens_UTD.sum().backward()
    assert all(weight.grad is not None for weight in module.parameters())
    assert any(bool(weight.grad.any()) for weight in module.parameters() if weight.grad is not None) == bool(texts)
    assert module({"text": ModalityTokens(rows[:0], valid[:0])})["text"].tokens_UTD.shape == (0, 4, 6)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = suffixes(1, "frozen")
    expected = module({"text": stored(1)})["text"].tokens_UTD
    monkeypatch.setattr("torchrec_em3.encoder_suffixes.CHUNK", 2)
    torch.testing.assert_close(module({"text": stored(1)})["text"].tokens_UTD, expected)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX512_BF16")
def test_bfloat16_is_near() -> None:
    exact, rough = suffixes(1, "last_n"), suffixes(1, "last_n")
    rough.use_bfloat16 = True
    tokens = rough({"text": stored(1)})["text"].tokens_UTD
    expected = exact({"text": stored(1)})["text"].tokens_UTD
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - expected).abs().max() < 0.05
    tokens.sum().backward()


def test_bfloat16_needs_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    check_bfloat16(EncodersConfig(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"--model\.encoders\.bfloat16 needs .* which this cpu is not; leave it off"):
        check_bfloat16(EncodersConfig(bfloat16=True), torch.device("cpu"))


def test_bfloat16_that_a_gpu_emulates_is_none_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match="which this cuda is not; leave it off"):
        check_bfloat16(EncodersConfig(bfloat16=True), torch.device("cuda"))


@pytest.mark.parametrize(
    ("recorded", "training", "layers", "message"),
    [
        ({}, "lora", 0, r"training lora: DATA has no text; prepare it with a text encoder"),
        ({"encoder": "minilm", "dim": 128}, "last_n", 0, r"whole text encoder 'minilm' gave.*again with --text_cut"),
        (RECORDED, "full", 0, r"needs raw inputs, but DATA is cut after layer 1 of 3.*--text_cut 0, or use last_n"),
        (RECORDED, "last_n", 3, r"layers is 3, but DATA is cut after layer 1 of 3, so 2 are left.*--text_cut 0"),
        (RECORDED, "lora", 3, r"layers is 3, but DATA is cut after layer 1 of 3"),
        ({**RECORDED, "source": "other"}, "frozen", 0, r"text encoder 'tiny_deep_text' is now tiny_deep .* with other"),
    ],
)
def test_what_does_not_fit_the_store_is_refused(
    recorded: dict[str, Any], training: str, layers: int, message: str
) -> None:
    config = EncodersConfig(text=EncoderTraining(training=training, layers=layers))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        build_suffixes(config, {"text": recorded} if recorded else {}, "DATA")


def test_a_store_without_a_cut_needs_no_encoder() -> None:
    assert build_suffixes(EncodersConfig(), {"text": {"encoder": "gone", "dim": 4, "max_tokens": 2}}, "DATA") is None
