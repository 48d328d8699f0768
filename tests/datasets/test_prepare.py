"""The prepared folder: rows, labels, histories against brute force, modalities, and nothing left behind on failure."""

import json
import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets import prepare as prepare_module
from torchrec_em3.datasets.indexing import IndexedDataset, index_dataset
from torchrec_em3.datasets.movielens import read_movielens
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.splits import SPLITS, TEST, TRAIN, VALIDATION
from torchrec_em3.datasets.tokens import TokenStore
from torchrec_em3.errors import ConfigError, DataError

NO_ENCODERS = {"text_encoder": "none", "image_encoder": "none"}
TINY_ENCODERS = {"text_encoder": "tiny_text", "image_encoder": "tiny_image"}


def check_index(raw: RawDataset, indexed: IndexedDataset) -> None:
    """Hold an indexed data set against the raw events, one by one."""
    events, users, items = indexed.events, indexed.users.raw_id, indexed.items.raw_id
    told = [
        (str(users[u]), str(items[i]), float(r), int(t))
        for u, i, r, t in zip(events["user"], events["item"], events["rating"], events["timestamp"], strict=True)
    ]
    given_events = zip(raw.user_id, raw.item_id, raw.rating, raw.timestamp, strict=True)
    assert sorted(told) == sorted((str(u), str(i), float(r), int(t)) for u, i, r, t in given_events)
    keys = list(zip(events["timestamp"].tolist(), events["user"].tolist(), strict=True))
    assert keys == sorted(keys)
    for rows, column in ((indexed.users, "user"), (indexed.items, "item")):
        counts = np.bincount(events[column][events["split"] == TRAIN], minlength=len(rows.raw_id))
        assert np.array_equal(rows.train_count, counts)
        assert rows.raw_id[0] == ""
        assert np.all(counts[1 : rows.known + 1] > 0)
        assert not np.any(counts[rows.known + 1 :])
        order = [(-count, raw_id) for count, raw_id in zip(counts.tolist(), rows.raw_id.tolist(), strict=True)][1:]
        assert order == sorted(order)
    assert raw.items.item_id[indexed.catalogue].tolist() == items[1:].tolist()


def check_histories(indexed: IndexedDataset) -> None:
    """A history is the user's strictly earlier events, oldest first: never the event itself, never a later one."""
    events, histories = indexed.events, indexed.histories
    seen: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for user, item, timestamp, end in zip(
        *(events[name].tolist() for name in ("user", "item", "timestamp", "history_end")), strict=True
    ):
        earlier = [thing for when, thing in seen[user] if when < timestamp]
        assert histories.items[histories.offsets[user] : end].tolist() == earlier
        seen[user].append((timestamp, item))
    for user in range(len(histories.offsets) - 1):
        whole = histories.items[histories.offsets[user] : histories.offsets[user + 1]].tolist()
        assert whole == [item for _, item in seen[user]]


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), events=st.integers(60, 300), instants=st.integers(3, 400))
def test_index_and_histories_against_brute_force(split: str, seed: int, events: int, instants: int) -> None:
    raw = make_raw(events, 12, 30, instants, seed)
    indexed = index_dataset(raw, split=split, seed=seed, label_threshold=4.0)
    check_index(raw, indexed)
    check_histories(indexed)
    assert np.array_equal(indexed.events["label"], indexed.events["rating"] >= 4)


def test_the_index_does_not_depend_on_the_order_of_the_catalogue() -> None:
    raw = make_raw()
    turned = {name: getattr(raw.items, name)[::-1] for name in ("item_id", "title", "text", "image", "category")}
    other = replace(raw, items=replace(raw.items, **turned))
    one, two = (index_dataset(data, split="cold_items", seed=1, label_threshold=4.0) for data in (raw, other))
    assert np.array_equal(one.items.raw_id, two.items.raw_id)
    assert all(np.array_equal(one.events[name], two.events[name]) for name in one.events)


def test_leave_last_leaves_last(tmp_path: Path) -> None:
    raw = make_raw()
    indexed = index_dataset(raw, split="leave_last", seed=0, label_threshold=4.0)
    events = indexed.events
    for user in np.unique(events["user"]):
        mine = events["split"][events["user"] == user].tolist()
        assert mine == [TRAIN] * len(mine) if len(mine) < 3 else [TRAIN] * (len(mine) - 2) + [VALIDATION, TEST]
    assert indexed.time_cuts is None


def test_a_split_with_an_empty_part_is_refused() -> None:
    raw = make_raw()
    first = np.unique(raw.user_id, return_index=True)[1]
    once = replace(raw, **{name: getattr(raw, name)[first] for name in ("user_id", "item_id", "rating", "timestamp")})
    with pytest.raises(DataError, match=f"leave_last of {len(first)} events leaves {len(first)} to train, 0 to valid"):
        index_dataset(once, split="leave_last", seed=0, label_threshold=4.0)


@pytest.mark.parametrize("timed", [True, False])
def test_cold_items_leave_warm_events_to_time_or_to_each_users_order(timed: bool) -> None:
    raw = replace(make_raw(), timed=timed)
    indexed = index_dataset(raw, split="cold_items", seed=1, label_threshold=4.0)
    events = indexed.events
    trained = set(events["item"][events["split"] == TRAIN].tolist())
    cold = np.array([one for one in np.unique(events["item"]) if one not in trained])
    warm = np.isin(events["item"], list(trained))
    assert len(cold) >= 3
    assert not np.isin(events["split"][np.isin(events["item"], cold)], TRAIN).any()
    if timed:
        assert indexed.time_cuts is not None
        assert events["timestamp"][warm & (events["split"] == TRAIN)].max() < indexed.time_cuts[0]
    else:
        assert indexed.time_cuts is None
        for user in np.unique(events["user"]):
            mine = events["split"][warm & (events["user"] == user)].tolist()
            assert mine == sorted(mine), "a user's warm events train before they are held out"
            assert mine.count(VALIDATION) <= 1
            assert mine.count(TEST) <= 1


def test_labels_without_threshold_must_be_zero_or_one() -> None:
    raw = make_raw()
    clicks = replace(raw, rating=(raw.rating > 3).astype(np.float32))
    indexed = index_dataset(clicks, split="temporal", seed=0, label_threshold=None)
    assert np.array_equal(indexed.events["label"], indexed.events["rating"])
    first = int(np.argmax((raw.rating != 0) & (raw.rating != 1)))
    with pytest.raises(DataError, match=rf"row {first}: rating is {raw.rating[first]:g}.*must be 0 or 1"):
        index_dataset(raw, split="temporal", seed=0, label_threshold=None)


def test_folder_reads_back_as_written(tmp_path: Path) -> None:
    raw = replace(make_raw(), probability=np.random.default_rng(0).random(len(make_raw().rating)).astype(np.float32))
    meta = prepare(raw, tmp_path / "data", PrepareOptions(max_part_rows=70, **NO_ENCODERS))
    data = PreparedData.open(tmp_path / "data")
    assert dict(data.meta) == json.loads((tmp_path / "data" / "meta.json").read_text()) == meta
    assert len(list((tmp_path / "data" / "interactions").iterdir())) == -(-len(raw.rating) // 70)
    indexed = index_dataset(raw, split="temporal", seed=0, label_threshold=4.0)
    for number, split in enumerate(("train", "validation", "test")):
        rows = data.split_rows(split)
        assert len(rows["user"]) == meta["counts"][split] > 0
        for name, column in rows.items():
            assert column.dtype == indexed.events[name].dtype
            assert np.array_equal(column, indexed.events[name][indexed.events["split"] == number])
    assert "probability" in rows
    assert meta["simulated"] is True
    assert np.array_equal(data.history_items, indexed.histories.items)
    assert np.array_equal(data.history_offsets, indexed.histories.offsets)
    text_of = dict(zip(raw.items.item_id, raw.items.text, strict=True))
    ids, texts = data.items["raw_id"].to_pylist(), data.items["text"].to_pylist()
    assert texts == ["", *(text_of[raw_id] for raw_id in ids[1:])]
    assert np.array_equal(data.item_train_count, indexed.items.train_count)
    assert np.array_equal(data.user_train_count, indexed.users.train_count)
    assert (data.known_items, data.known_users) == (indexed.items.known, indexed.users.known)
    assert (data.item_rows, data.user_rows) == (len(indexed.items.raw_id), len(indexed.users.raw_id))
    data.verify()


def test_user_features_are_vocabulary_rows_of_trained_values_only(tmp_path: Path) -> None:
    raw = make_raw()
    indexed = index_dataset(raw, split="temporal", seed=0, label_threshold=4.0)
    new = [str(raw_id) for raw_id in indexed.users.raw_id[indexed.users.known + 1 :]]
    assert new, "the data must have users without training events"
    taste = {**raw.user_features["taste"], new[0]: "only a new user has this"}
    prepare(replace(raw, user_features={"taste": taste}), tmp_path / "data", PrepareOptions(**NO_ENCODERS))
    data = PreparedData.open(tmp_path / "data")
    assert data.user_feature_names == ["user", "taste"]
    assert [feature["rows"] for feature in data.meta["user_features"]] == [data.known_users + 1, 4]
    values = data.vocabulary("taste")
    assert values == ["", "x", "y", "z"]
    assert data.user_features.shape == (data.user_rows, 1)
    for raw_id, row in zip(data.users["raw_id"].to_pylist(), data.user_features[:, 0], strict=True):
        assert values[row] == ("" if raw_id == new[0] else taste.get(raw_id, ""))


def test_unusable_modalities_are_counted_and_masked(tmp_path: Path) -> None:
    raw = make_raw(image_root=tmp_path)
    image, text = raw.items.image.copy(), raw.items.text.copy()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "good.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:300])
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    image[:4] = ["good.jpg", "half.jpg", "page.jpg", "gone.jpg"]
    text[:5] = ""
    raw = replace(raw, items=replace(raw.items, image=image, text=text))
    meta = prepare(raw, tmp_path / "data", PrepareOptions(**TINY_ENCODERS))
    counts = {
        name: [part[key] for key in ("present", "missing", "broken")] for name, part in meta["modalities"].items()
    }
    assert counts == {"text": [25, 5, 0], "image": [1, 27, 2]}
    assert meta["modalities"]["text"] | {"present": 0, "missing": 0} == {
        **{"encoder": "tiny_text", "options": {}, "source": "tiny_text", "dim": 8, "encoder_dim": 8, "max_tokens": 6},
        **{"present": 0, "missing": 0, "broken": 0},
    }
    data = PreparedData.open(tmp_path / "data")
    store = TokenStore(data.tokens_folder)
    rows = {raw_id: row for row, raw_id in enumerate(data.items["raw_id"].to_pylist())}
    present = np.load(data.tokens_folder / "image" / "present.npy")
    assert np.flatnonzero(present).tolist() == [rows[raw.items.item_id[0]]]
    assert store.num_rows == data.item_rows
    data.verify()


def test_a_modality_that_no_item_has_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = make_raw()
    raw = replace(raw, items=replace(raw.items, image=np.full(len(raw.items.image), "", dtype=object)))
    meta = prepare(raw, tmp_path / "data", PrepareOptions(**TINY_ENCODERS))
    assert list(meta["modalities"]) == ["text"]
    assert not (tmp_path / "data" / "tokens" / "image").exists()
    assert "image: the catalogue names none; left out" in caplog.text
    PreparedData.open(tmp_path / "data").verify()


def test_the_same_data_and_seed_give_the_same_hash(tmp_path: Path) -> None:
    options = PrepareOptions(split="cold_items", text_encoder="tiny_text", image_encoder="none")
    hashes = [prepare(make_raw(), tmp_path / str(run), options)["content_hash"] for run in range(2)]
    assert hashes[0] == hashes[1]
    other = prepare(make_raw(), tmp_path / "other", replace(options, seed=1))["content_hash"]
    assert other != hashes[0]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    options = PrepareOptions(**NO_ENCODERS)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty and not a prepared folder"):
            prepare(make_raw(), mine, replace(options, overwrite=overwrite))
    with pytest.raises(DataError, match="is a file"):
        prepare(make_raw(), mine / "thesis.txt", options)
    assert (mine / "thesis.txt").read_text() == "precious"

    (tmp_path / "data").mkdir()
    first = prepare(make_raw(), tmp_path / "data", options)
    with pytest.raises(DataError, match="holds prepared data already"):
        prepare(make_raw(seed=1), tmp_path / "data", options)
    second = prepare(make_raw(seed=1), tmp_path / "data", replace(options, overwrite=True))
    assert first["content_hash"] != second["content_hash"] == PreparedData.open(tmp_path / "data").meta["content_hash"]
    assert listing(tmp_path) == ["data", "mine"]


@pytest.mark.parametrize("step", ["_write_tokens", "hash_content"])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    options = PrepareOptions(overwrite=True, **NO_ENCODERS)
    before = prepare(make_raw(), tmp_path / "old", options)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, step, fail)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare(make_raw(seed=1), tmp_path / name, options)
    assert listing(tmp_path) == ["old"]
    data = PreparedData.open(tmp_path / "old")
    data.verify()
    assert data.meta["content_hash"] == before["content_hash"]


def test_a_failing_last_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PrepareOptions(overwrite=True, **NO_ENCODERS)
    before = prepare(make_raw(), tmp_path / "data", options)
    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if path.suffix == ".new":
            raise PermissionError("the disk says no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(PermissionError):
        prepare(make_raw(seed=1), tmp_path / "data", options)
    assert listing(tmp_path) == ["data"]
    assert PreparedData.open(tmp_path / "data").meta["content_hash"] == before["content_hash"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "temporl"}, r"option split is 'temporl'.*Did you mean 'temporal'"),
        ({"encode_batch_size": 0}, r"option encode_batch_size is 0, must be at least 1"),
        ({"max_part_rows": 0}, r"option max_part_rows is 0"),
        ({"seed": -1}, r"option seed is -1"),
        ({"label_threshold": float("nan")}, r"option label_threshold is nan"),
        ({"text_cut": 2}, r"--text_cut is 2, but --text_encoder is none; name an encoder"),
        ({"text_cut": 2, "text_encoder": "tiny_text"}, r"encoder 'tiny_text' \(tiny_text\) cannot be cut"),
        ({"text_encoder": "tiny_txt"}, r"unknown encoder 'tiny_txt'.*Did you mean 'tiny_text'"),
        ({"text_encoder": "tiny_image"}, r"encoder 'tiny_image' encodes image; choose it as image_encoder"),
        ({"text_encoder_options": {"max_token": 8}, "text_encoder": "minilm"}, r"no option 'max_token'.*'max_tokens'"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(make_raw(), tmp_path / "data", PrepareOptions(**{**NO_ENCODERS, **options}))
    assert not list(tmp_path.iterdir())


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "data-format.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace("label_threshold=None", f"label_threshold=None, **{TINY_ENCODERS}")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["data"].meta["modalities"]["text"]["missing"] == 1
    assert sum(names["data"].meta["counts"][split] for split in ("train", "validation", "test")) == 5
    assert len(names["rows"]["user"]) == names["data"].meta["counts"]["train"]


real = pytest.mark.skipif("EM3_REAL_DATA" not in os.environ, reason="EM3_REAL_DATA names no folder of real data")


@real
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_real_histories_and_splits(tmp_path: Path, name: str, split: str) -> None:
    ratings = Path("ratings_users_1_to_2999.dat.gz") if name == "ml-1m" else None
    raw = read_movielens(Path(os.environ["EM3_REAL_DATA"]) / name, ratings)
    indexed = index_dataset(raw, split=split, seed=0, label_threshold=4.0)
    if name == "ml-100k":
        check_index(raw, indexed)
        check_histories(indexed)
    events, histories = indexed.events, indexed.histories
    # Brute force over every event of the larger set is slow in Python, so a seeded sample of users is checked in full.
    sample = np.random.default_rng(0).choice(np.arange(1, len(indexed.users.raw_id)), 60, replace=False)
    for user in sample:
        mine = events["user"] == user
        timestamps, items = events["timestamp"][mine], events["item"][mine]
        for timestamp, end in zip(timestamps, events["history_end"][mine], strict=True):
            expected = items[timestamps < timestamp]
            assert np.array_equal(histories.items[histories.offsets[user] : end], expected)
    parts = [events["item"][events["split"] == part] for part in (TRAIN, VALIDATION, TEST)]
    if split == "temporal":
        times = [events["timestamp"][events["split"] == part] for part in (TRAIN, VALIDATION, TEST)]
        assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()
    if split == "cold_items":
        cold = set(parts[1].tolist()) ^ set(parts[2].tolist())
        assert len(cold - set(parts[0].tolist())) >= round(0.1 * len(np.unique(raw.item_id)))
    prepare(raw, tmp_path / "data", PrepareOptions(split=split, **NO_ENCODERS))
    assert len(PreparedData.open(tmp_path / "data").split_rows("train")["user"]) == len(parts[0])
