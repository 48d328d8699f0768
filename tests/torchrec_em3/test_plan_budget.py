"""What a rank holds besides tables, as planned: the bytes of what it then really holds."""

import json
from pathlib import Path
from typing import Any

import pytest

import tests.tiny_encoders
import tests.tiny_parts  # noqa: F401
from torchrec_em3.build import build_model, build_sharded, open_data
from torchrec_em3.cli import run as em3
from torchrec_em3.components.managed_ids import ManagedIds
from torchrec_em3.config import Config, EmbeddingConfig, EncodersConfig, EncoderTraining, ModelConfig
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.plan_budget import model_budget
from torchrec_em3.plan_page import to_html, to_markdown
from torchrec_em3.process_group import process_group

USERS, ITEMS = 24, 60
MAPS = {
    "user_table": {"ids": "managed", "rows": USERS, "eviction": "lru"},
    "item_table": {"ids": "managed", "rows": ITEMS, "eviction": "distance_lfu"},
}


@pytest.fixture(scope="module")
def cut_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts cut after layer 1 of 3."""
    folder = tmp_path_factory.mktemp("cut")
    raw = simulate(SimulatedOptions(num_items=40, num_users=20, num_interactions=400), folder)
    options = PrepareOptions(text_encoder="tiny_deep_text", image_encoder="none", text_cut=1, label_threshold=None)
    prepare(raw, folder / "data", options)
    return folder / "data"


def test_maps_of_raw_ids_take_what_was_planned(tiny_data: Path) -> None:
    config = resolve_parts(
        Config(data=str(tiny_data), model=ModelConfig(embedding_dim=8), embeddings=EmbeddingConfig(tables=MAPS))
    )
    data = open_data(config)
    model = build_model(config, data)
    raw_ids = 8 * data.item_rows
    # Id, row and what the policy counts: one number for lru, two for distance_lfu.
    assert model_budget(model, 1).id_map_bytes == 8 * (3 * USERS + 4 * ITEMS) + raw_ids
    assert model_budget(model, 2).id_map_bytes == 8 * (3 * USERS + 4 * ITEMS) // 2 + raw_ids
    with process_group() as ranks:
        sharded = build_sharded(config, data, ranks)
    maps = [module for module in sharded.model.modules() if isinstance(module, ManagedIds)]
    per_row = [buffer for module in maps for buffer in module.buffers() if len(buffer) == module.output_size()]
    held = sum(buffer.nbytes for buffer in per_row) + sharded.model.items._raw_ids.nbytes
    assert held == sharded.plan.as_dict()["budget"]["id_map_bytes"]


@pytest.mark.parametrize(("ids", "bytes_an_item"), [("hashed", 8), ("fixed", 0)])
def test_only_raw_ids_of_items_are_kept(tiny_data: Path, ids: str, bytes_an_item: int) -> None:
    tables = {} if ids == "fixed" else {name: {"ids": ids, "rows": 30} for name in ("user_table", "item_table")}
    config = resolve_parts(
        Config(data=str(tiny_data), model=ModelConfig(content="none"), embeddings=EmbeddingConfig(tables=tables))
    )
    data = open_data(config)
    assert model_budget(build_model(config, data), 2).id_map_bytes == bytes_an_item * data.item_rows


@pytest.mark.parametrize("training", ["frozen", "lora", "last_n"])
def test_of_an_encoder_only_what_is_trained_has_more_than_its_weights(cut_data: Path, training: Any) -> None:
    encoders = EncodersConfig(text=EncoderTraining(training=training, layers=1, rank=2))
    config = resolve_parts(Config(data=str(cut_data), model=ModelConfig(embedding_dim=8, encoders=encoders)))
    model = build_model(config, open_data(config))
    budget = model_budget(model, 4)
    assert model.content is not None
    parts = list(model.content.tokens.encoders.parameters())
    trained = sum(weight.numel() for weight in parts if weight.requires_grad)
    assert budget.encoder_parameters == sum(weight.numel() for weight in parts) > trained
    assert (trained == 0) == (training == "frozen")
    assert budget.encoder_bytes == 4 * budget.encoder_parameters + 16 * trained
    others = sum(weight.numel() for name, weight in model.named_parameters() if ".tables." not in name)
    assert budget.dense_parameters == others - budget.encoder_parameters
    assert budget.fixed_bytes == budget.bank_bytes + budget.dense_bytes + budget.encoder_bytes


def test_em3_plan_counts_the_encoders_of_the_data(cut_data: Path, tmp_path: Path) -> None:
    tables = json.dumps({"item_table": {"ids": "managed", "rows": ITEMS}})
    chosen = ["--data", str(cut_data), "--model.encoders.text.training", "lora", "--embeddings.tables", tables]
    assert em3(["plan", *chosen, "--out", str(tmp_path / "plan")]) == 0
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (plan,), facts = written["plans"], written["facts"]
    config = resolve_parts(
        Config(
            data=str(cut_data),
            model=ModelConfig(encoders=EncodersConfig(text=EncoderTraining(training="lora"))),
            embeddings=EmbeddingConfig(tables={"item_table": {"ids": "managed", "rows": ITEMS}}),
        )
    )
    assert plan["budget"] == model_budget(build_model(config, open_data(config)), 1).as_dict()
    assert min(plan["budget"][f"{part}_bytes"] for part in ("encoder", "id_map")) > 0
    for text in (to_markdown([plan], facts), to_html([plan], facts)):
        assert "encoders above their cuts" in text
        assert "maps from raw ids" in text
