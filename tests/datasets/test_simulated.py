import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from torchrec_em3.components.encoders.image import EfficientNetEncoder, EfficientNetOptions
from torchrec_em3.components.encoders.text import MiniLMEncoder, MiniLMOptions
from torchrec_em3.datasets import simulated, simulated_world
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.datasets.simulated_exposure import _draw_items, draw_events
from torchrec_em3.datasets.simulated_pictures import VISUAL_ATTRIBUTES, draw_picture
from torchrec_em3.datasets.simulated_texts import PHRASES, TEXT_ATTRIBUTES, write_description
from torchrec_em3.datasets.simulated_world import USER_FEATURES, draw_world
from torchrec_em3.errors import ConfigError

ALL = slice(None)
TINY = SimulatedOptions(num_items=60, num_users=40, num_interactions=1500, seed=3, image_size=32)


@cache
def default_events() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User, item, time and logit without bias of the default world's events."""
    options = SimulatedOptions()
    world = draw_world(options)
    events = draw_events(world, options)
    return events.user_E, events.item_E, events.time_E, events.logit_E


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    """All the events of the default world, with small pictures."""
    return simulate(SimulatedOptions(image_size=16), tmp_path_factory.mktemp("simulated"))


def columns(raw: RawDataset) -> list[np.ndarray]:
    items = [getattr(raw.items, field.name) for field in dataclasses.fields(raw.items)]
    assert raw.probability is not None
    return [raw.user_id, raw.item_id, raw.rating, raw.timestamp, raw.probability, *items]


def test_a_seed_is_a_data_set(tmp_path: Path) -> None:
    first, second = simulate(TINY, tmp_path / "a"), simulate(TINY, tmp_path / "b")
    for one, other in zip(columns(first), columns(second), strict=True):
        assert np.array_equal(one, other)
    assert first.user_features == second.user_features
    names = [name for name in first.items.image if name]
    assert len(names) >= 50
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    third = simulate(dataclasses.replace(TINY, seed=4), tmp_path / "c")
    assert not np.array_equal(first.probability[:100], third.probability[:100])  # type: ignore[index]
    assert (tmp_path / "a" / names[0]).read_bytes() != (tmp_path / "c" / names[0]).read_bytes()


def test_the_default_has_its_size_and_form(raw: RawDataset) -> None:
    assert len(raw.items.item_id) == len(set(raw.items.item_id)) == 1200
    assert 89_000 < len(raw.rating) <= 90_000
    assert 990 <= len(set(raw.user_id.tolist())) <= 1000
    assert set(raw.item_id.tolist()) <= set(raw.items.item_id.tolist())
    assert (np.diff(raw.timestamp) >= 0).all()
    assert set(np.unique(raw.rating)) == {0.0, 1.0}
    assert len(set(zip(raw.user_id.tolist(), raw.item_id.tolist(), strict=True))) == len(raw.rating), (
        "an item is shown once to a user"
    )
    assert set(raw.user_features) == set(USER_FEATURES)
    assert all(len(values) == 1000 for values in raw.user_features.values())


def test_labels_follow_their_probability(raw: RawDataset) -> None:
    assert raw.probability is not None
    assert raw.probability.mean() == pytest.approx(0.45, abs=1e-3)
    for low in np.arange(0.0, 1.0, 0.1):
        inside = (raw.probability >= low) & (raw.probability < low + 0.1)
        error = 4 * 0.5 / np.sqrt(inside.sum())
        assert raw.rating[inside].mean() == pytest.approx(raw.probability[inside].mean(), abs=error)


def test_the_attainable_auc_is_worth_learning_for(raw: RawDataset) -> None:
    assert 0.82 < roc_auc_score(raw.rating, raw.probability) < 0.86


@pytest.mark.parametrize("seed", [1, 2])
def test_the_end_of_the_time_line_holds_cold_items(seed: int) -> None:
    options = SimulatedOptions(seed=seed)
    item_E = draw_events(draw_world(options), options).item_E
    train, test = item_E[: int(0.8 * len(item_E))], item_E[int(0.9 * len(item_E)) :]
    cold = ~np.isin(test, train)
    assert 0.10 < cold.mean() < 0.30
    assert len(np.unique(test[cold])) > 40


def test_nothing_is_shown_before_its_release() -> None:
    world = draw_world(SimulatedOptions())
    _, item_E, time_E, _ = default_events()
    assert (time_E >= world.release_I[item_E]).all()
    assert (np.diff(time_E) >= 0).all()


def test_popularity_has_a_long_tail() -> None:
    count = np.sort(np.bincount(default_events()[1], minlength=1200))[::-1]
    assert count[:120].sum() > 0.25 * count.sum()
    assert np.median(count) < 0.8 * count.mean()
    assert count[600:].sum() < 0.25 * count.sum()


def test_shown_items_are_liked_more_than_chance() -> None:
    world = draw_world(SimulatedOptions())
    user_E, item_E, _, logit_E = default_events()
    any_user = np.random.default_rng(0).permutation(user_E)
    assert logit_E.mean() > world.logits(ALL)[any_user, item_E].mean() + 0.5


def test_exposure_without_liking_is_independent_of_it() -> None:
    options = SimulatedOptions(exposure_share=0.0)
    world = draw_world(options)
    events = draw_events(world, options)
    other = world.logits(ALL)[np.random.default_rng(0).permutation(events.user_E), events.item_E]
    assert events.logit_E.mean() == pytest.approx(other.mean(), abs=0.03)


@pytest.mark.parametrize(("visual", "textual"), [(0.45, 0.35), (1.0, 0.0), (0.0, 0.0), (0.9, 0.1)])
def test_the_shares_of_the_logit_are_as_asked(visual: float, textual: float) -> None:
    world = draw_world(SimulatedOptions(num_items=600, num_users=400, visual=visual, textual=textual))
    logit_UI = world.logits(ALL)
    assert logit_UI.std() == pytest.approx(1.5, abs=0.1)
    for attributes, share in ((VISUAL_ATTRIBUTES, visual), (TEXT_ATTRIBUTES, textual)):
        one_hot = np.concatenate([np.eye(len(attributes[name]))[world.values[name]] for name in attributes], axis=1)
        fitted = one_hot @ np.linalg.lstsq(one_hot, logit_UI.T, rcond=None)[0]
        by_chance = one_hot.shape[1] / 600
        assert fitted.var() / logit_UI.var() == pytest.approx(share, abs=by_chance + 0.05)


def test_side_features_say_a_little_about_taste() -> None:
    world = draw_world(SimulatedOptions())
    labels = USER_FEATURES["age_group"][1]
    logit_UI = world.logits(ALL)
    by_group = np.stack([logit_UI[world.groups["age_group"] == group].mean(0) for group in range(len(labels))])
    share = by_group.var(0).mean() / logit_UI.var()
    assert 0.01 < share < 0.15


def test_users_in_blocks_are_the_same_world_with_events_of_the_same_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimulatedOptions(num_items=200, num_users=150, num_interactions=8000)
    world = draw_world(options)
    whole, logit_UI = draw_events(world, options), world.logits(ALL)
    monkeypatch.setattr(simulated_world, "_BLOCK_PAIRS", 40 * options.num_items)
    blocks = draw_world(options)
    assert [(users.start, users.stop) for users in blocks.blocks] == [(0, 40), (40, 80), (80, 120), (120, 150)]
    assert np.concatenate([blocks.logits(users) for users in blocks.blocks]) == pytest.approx(logit_UI, abs=1e-5)
    assert np.array_equal(blocks.release_I, world.release_I)
    events = draw_events(blocks, options)
    assert len(events.user_E) == pytest.approx(len(whole.user_E), rel=0.02)
    assert (np.diff(events.time_E) >= 0).all()
    assert (events.time_E >= world.release_I[events.item_E]).all()
    assert len(set(zip(events.user_E.tolist(), events.item_E.tolist(), strict=True))) == len(events.user_E)
    assert events.logit_E == pytest.approx(logit_UI[events.user_E, events.item_E], abs=1e-5)
    shares = np.bincount(events.user_E // 40) / len(events.user_E)
    assert shares == pytest.approx([40 / 150] * 3 + [30 / 150], abs=0.02)
    assert events.logit_E.mean() == pytest.approx(whole.logit_E.mean(), abs=0.1)


def test_chances_of_a_few_events_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimulatedOptions(click_rate=0.3)
    logit_E = np.random.default_rng(0).normal(size=500).astype(np.float32)
    click_E, probability_E = simulated._draw_clicks(logit_E, options)
    assert probability_E.mean() == pytest.approx(0.3, abs=1e-5)
    monkeypatch.setattr(simulated, "_CHUNK", 37)
    few_click_E, few_probability_E = simulated._draw_clicks(logit_E, options)
    assert few_probability_E == pytest.approx(probability_E, abs=1e-6)
    assert np.array_equal(few_click_E, click_E)


def test_draws_are_distinct_and_follow_the_weights() -> None:
    key = np.log(np.array([[1.0, 2.0, 4.0, 1e-12]] * 3000, dtype=np.float32))
    items = _draw_items(key, np.repeat(np.arange(3000), 2), np.random.default_rng(0)).reshape(3000, 2)
    assert (items[:, 0] != items[:, 1]).all()
    assert np.bincount(items[:, 0], minlength=4) / 3000 == pytest.approx([1 / 7, 2 / 7, 4 / 7, 0], abs=0.04)


def test_a_user_who_has_seen_all_is_shown_nothing() -> None:
    key = np.array([[0.0, -np.inf], [0.0, 0.0]], dtype=np.float32)
    items = _draw_items(key, np.array([0, 0, 1, 1, 1]), np.random.default_rng(0))
    assert sorted(items[:2].tolist()) == [-1, 0]
    assert sorted(items[2:].tolist()) == [-1, 0, 1]


def test_pictures_and_texts_are_missing_as_often_as_asked(tmp_path: Path) -> None:
    raw = simulate(dataclasses.replace(TINY, missing_image=0.5, missing_text=1.0), tmp_path)
    assert 15 < (raw.items.image == "").sum() < 45
    assert (raw.items.text == "").all()
    written = {f"images/{path.name}" for path in (tmp_path / "images").iterdir()}
    assert written == {name for name in raw.items.image if name}
    with Image.open(tmp_path / sorted(written)[0]) as picture:
        assert picture.size == (32, 32)


def test_one_thing_is_described_and_drawn_in_many_ways() -> None:
    rng = np.random.default_rng(0)
    value = {"topic": "music", "material": "oak", "style": "elegant", "use": "office"}
    texts = {write_description(value, rng) for _ in range(40)}
    assert len(texts) > 35
    assert all(any(phrase in text.lower() for phrase in PHRASES["topic"]["music"]) for text in texts)
    assert not any(" a elegant" in text for text in texts)
    look = {"colour": "red", "shape": "heart", "pattern": "dotted", "size": "small"}
    assert draw_picture(look, 32, rng).tobytes() != draw_picture(look, 32, rng).tobytes()


def probe(features: np.ndarray, value: np.ndarray, train: int) -> float:
    """Return how often a linear model, fitted to the first `train` items, names the value of the others."""
    scaled = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-3)
    model = LogisticRegression(C=0.1, max_iter=200).fit(scaled[:train], value[:train])
    return float(model.score(scaled[train:], value[train:]))


def test_encoders_see_the_attributes_and_only_their_own() -> None:
    options = SimulatedOptions(num_items=240, num_users=10)
    values = draw_world(options).values
    attributes = VISUAL_ATTRIBUTES | TEXT_ATTRIBUTES
    rng = np.random.default_rng(0)
    items = [{name: attributes[name][values[name][item]] for name in attributes} for item in range(options.num_items)]
    tokens, _ = EfficientNetEncoder(EfficientNetOptions(image_size=96)).encode(
        [draw_picture(item, 96, rng) for item in items]
    )
    picture = tokens.mean(1).numpy()
    tokens, lengths = MiniLMEncoder(MiniLMOptions()).encode([write_description(item, rng) for item in items])
    text = (tokens.sum(1) / lengths[:, None]).numpy()
    assert torch.isfinite(tokens).all()
    for name, features, other in (("colour", picture, text), ("shape", picture, text), ("topic", text, picture)):
        assert probe(features, values[name], 180) > 0.6, name
        assert probe(other, values[name], 180) < 0.35, name  # 0.125 is chance


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_items", 5),
        ("visual", 1.2),
        ("click_rate", 1.0),
        ("seed", -1),
        ("logit_std", float("nan")),
        ("textual", 0.6),
    ],
)
def test_bad_options_are_named(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        SimulatedOptions(**{option: value})  # type: ignore[arg-type]
