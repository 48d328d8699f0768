"""New items: what is read, and tokens that are the prepared ones bit for bit where the item is the same."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets import token_reduction
from torchrec_em3.datasets.movielens_catalogue import read_catalogue
from torchrec_em3.datasets.new_items import encode_new_items, read_new_items
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawItems
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.registry import ENCODERS


@dataclass(frozen=True, kw_only=True)
class TwiceOptions:
    times: int = 1
    revision: str = "main"


@ENCODERS.register("test_times", options=TwiceOptions)
class TimesEncoder:
    """As many tokens as the option says, of a hub whose branch `main` is commit c1 today."""

    modality, dim = "text", 4

    def __init__(self, options: TwiceOptions) -> None:
        self.max_tokens = options.times
        self.source = f"hub/times@{'c1' if options.revision == 'main' else options.revision}"

    def encode(self, inputs: list[str]) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([float(len(text)) for text in inputs])
        return tokens[:, None, None].expand(-1, self.max_tokens, 4).clone(), torch.full((len(inputs),), self.max_tokens)


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_a_parquet_table_is_read_as_prepare_reads_it(tmp_path: Path) -> None:
    columns = {"item_id": [7, 8, 9], "title": ["Blue <b>mug</b>", None, "Jar"], "image": ["a.png", None, ""]}
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    picture(tmp_path / "images" / "a.png", "blue")
    picture(tmp_path / "posters" / "9.png", "red")
    items = read_new_items(tmp_path)
    assert items.item_id.tolist() == ["7", "8", "9"]
    assert items.title.tolist() == items.text.tolist() == ["Blue mug", "", "Jar"]
    assert items.image.tolist() == ["images/a.png", "", "posters/9.png"]


def test_texts_are_read_as_they_stand_and_pictures_found_by_id(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        'item_id,title,price,text\nb1,Blue\x0bmug,3,"A mug,\nlarge"\na/2,"Cup",4,\n007,,5,Jar\n', encoding="utf-8"
    )
    picture(tmp_path / "images" / "b1.JPG", "blue")
    picture(tmp_path / "images" / "007.png", "red")
    picture(tmp_path / "posters" / "007.png", "red")
    items = read_new_items(tmp_path)
    assert items.item_id.tolist() == ["b1", "a/2", "007"]
    assert items.title.tolist() == ["Blue mug", "Cup", ""]
    assert items.text.tolist() == ["A mug,\nlarge", "", "Jar"]
    assert items.image.tolist() == ["images/b1.JPG", "", "posters/007.png"]


def test_without_texts_it_is_a_movielens_file(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        'movie_id,title,genres,plot,poster\n5,"Matrix, The (1999)",Action|Sci-Fi,A hacker learns.,m.jpg\n6,Up,,,\n'
    )
    picture(tmp_path / "images" / "6.png", "red")
    items = read_new_items(tmp_path)
    assert items.text.tolist() == read_catalogue(tmp_path, np.array([], dtype=str)).text.tolist()
    assert items.text[0] == "The Matrix (1999). action, science fiction. A hacker learns."
    assert items.image.tolist() == ["posters/m.jpg", "images/6.png"]


def test_a_parquet_table_without_items_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": pa.array([], pa.string())}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match="its table holds no items"):
        read_new_items(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no items\.parquet or items\.csv; it needs the columns item_id, title and text"),
        ("item_id,text\n", "the file holds no rows"),
        ("id,text\n1,x\n", "no column 'item_id' among id, text"),
        ("item_id,text\n1,x\n1,y\n", "row 3: item_id '1' stands in row 2 already"),
        ("item_id,text\n,x\n", "row 2: item_id is empty"),
        ("item_id,text\n1,x,y\n", "row 2: 3 fields, expected 2"),
    ],
)
def test_a_malformed_file_is_refused_by_row(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "items.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_new_items(tmp_path)


def make_prepared(folder: Path, **options: object) -> tuple[PreparedData, RawItems]:
    """Prepare a catalogue with a picture for every second item; return it and its items in prepared order."""
    raw = make_raw(image_root=folder)
    for number, item in enumerate(raw.items.item_id[::2]):
        picture(folder / "images" / f"{item}.png", f"#{number:02x}80{255 - number:02x}")
        raw.items.image[2 * number] = f"images/{item}.png"
    chosen = {"text_encoder": "tiny_text", "image_encoder": "tiny_image", "token_dim": 5, **options}
    prepare(raw, folder / "data", PrepareOptions(**chosen))  # type: ignore[arg-type]
    data = PreparedData.open(folder / "data")
    columns = {name: data.items[name].to_numpy()[1:] for name in ("title", "text", "image", "category")}
    return data, RawItems(item_id=data.items["raw_id"].to_numpy()[1:], **columns)


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 40), block=st.integers(1, 40))
def test_tokens_are_the_prepared_ones_whatever_the_batches(
    batch_size: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("new")
    data, items = make_prepared(folder)
    assert (data.tokens_folder / "text" / "reduction.npy").is_file()
    assert not (data.tokens_folder / "image" / "reduction.npy").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_reduction, "BLOCK_ITEMS", block)
        store = encode_new_items(items, folder, data, folder / "tokens", batch_size)
    assert store.token_dims == {"image": 3, "text": 5}
    for modality in ("text", "image"):
        for name in ("tokens.npy", "lengths.npy", "present.npy"):
            new, prepared = (np.load(at / modality / name) for at in (folder / "tokens", data.tokens_folder))
            assert np.array_equal(new, prepared)


def edit(data: PreparedData, modality: str, **changes: object) -> PreparedData:
    meta = json.loads(json.dumps(data.meta))
    meta["modalities"][modality] |= changes
    return PreparedData(data.folder, meta)


@pytest.mark.parametrize("changes", [{"source": "other"}, {"encoder_dim": 9}, {"max_tokens": 7}])
def test_an_encoder_that_differs_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    data, items = make_prepared(tmp_path)
    with pytest.raises(ConfigError, match=r"text encoder 'tiny_text' is now .* but the data was prepared with"):
        encode_new_items(items, tmp_path, edit(data, "text", **changes), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(ConfigError, match="unknown encoder 'tiny_txt'"):
        encode_new_items(items, tmp_path, edit(data, "text", encoder="tiny_txt"), tmp_path / "tokens")


def test_recorded_options_and_commit_are_used(tmp_path: Path) -> None:
    chosen = {"text_encoder": "test_times", "text_encoder_options": {"times": 3, "revision": "c0"}}
    data, items = make_prepared(tmp_path, image_encoder="none", **chosen)
    assert data.meta["modalities"]["text"]["source"] == "hub/times@c0"
    store = encode_new_items(items, tmp_path, edit(data, "text", options={"times": 3}), tmp_path / "tokens")
    assert store.token_counts == {"text": 3}
    shutil.rmtree(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"with up to 1 tokens of width 4, but .* up to 3 tokens"):
        encode_new_items(items, tmp_path, edit(data, "text", options={}), tmp_path / "tokens")
