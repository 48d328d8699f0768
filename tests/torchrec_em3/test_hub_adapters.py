"""Adapters of an encoder's upper layers, as peft puts them on the whole encoder."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from tests.components.test_text_encoder import tiny_bert  # noqa: F401  (fixture)
from torchrec_em3.components.encoders.adapters import adapt_layers
from torchrec_em3.components.encoders.efficientnet import EfficientNetLite0
from torchrec_em3.components.encoders.image_cut import ImageSuffix
from torchrec_em3.components.encoders.text_cut import TextSuffix
from torchrec_em3.hub_adapters import save_adapter


def adapted(suffix: TextSuffix | ImageSuffix, top: int) -> nn.Module:
    """Give the uppermost layers adapters that change something."""
    module = adapt_layers(suffix, list(suffix.layers)[-top:], rank=2, alpha=4)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.5)
    return module.eval()


@torch.no_grad()
def test_of_a_transformer(tiny_bert: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import BertModel

    whole = BertModel.from_pretrained(tiny_bert).eval()
    ids_UT = torch.randint(1, 30, (3, 6))
    hidden = whole(input_ids=ids_UT, output_hidden_states=True).hidden_states
    trained = adapted(TextSuffix(whole, cut=1), top=1)
    expected_UTD, _ = trained(hidden[1], torch.ones(3, 6, dtype=torch.bool))
    save_adapter(tmp_path / "text", trained)
    model = PeftModel.from_pretrained(whole, str(tmp_path / "text")).eval()
    torch.testing.assert_close(model(input_ids=ids_UT).last_hidden_state, expected_UTD, atol=1e-5, rtol=1e-5)
    assert (expected_UTD - hidden[-1]).abs().max() > 0.01
    assert all(name.startswith("encoder.layer.1.") for name in model.peft_config["default"].target_modules)


@torch.no_grad()
def test_of_an_image_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = EfficientNetLite0().eval()
    pixels = torch.randn(2, 3, 64, 64)
    before = whole.blocks[:14](whole.stem(pixels))
    rows_UPW = before.flatten(2).transpose(1, 2)
    trained = adapted(ImageSuffix(whole, cut=14), top=2)
    expected_UTD, _ = trained(rows_UPW, torch.ones(rows_UPW.shape[:2], dtype=torch.bool))
    plain = whole.blocks(whole.stem(pixels))
    save_adapter(tmp_path / "image", trained)
    model = PeftModel.from_pretrained(whole, str(tmp_path / "image")).eval().base_model.model
    found = model.blocks(model.stem(pixels)).flatten(2).transpose(1, 2)
    scale = expected_UTD.std()  # random weights shrink what passes through them
    torch.testing.assert_close(found / scale, expected_UTD / scale, atol=1e-4, rtol=1e-4)
    assert (found - plain.flatten(2).transpose(1, 2)).std() > 0.1 * scale
