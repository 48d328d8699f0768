import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests.fake_runs import fake_run
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.report import write_report

VOID = {"meta", "br", "line", "path", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.tags, self.open, self.attributes = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


@pytest.fixture(scope="module")
def runs(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        fake_run(root / "id_only", data, content=False),
        fake_run(root / "em3", data, content=True, world_size=2),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(runs, tmp_path_factory.mktemp("page") / "new" / "report.html"))


def test_runs_with_other_data_are_neither_compared_nor_joined_to_it(
    runs: list[Path], data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_em3.report_maps.project", lambda vectors, seed: np.zeros((len(vectors), 2)))
    for run, found in zip(runs, (data.meta["content_hash"], "another"), strict=True):
        shutil.copytree(run, tmp_path / run.name)
        (tmp_path / run.name / "data.json").write_text(json.dumps({"content_hash": found}))
    page = Page(write_report([tmp_path / run.name for run in runs], tmp_path / "report.html"))
    assert f"but {tmp_path / 'em3'} was trained on another" in page.words
    assert "content seems to help" not in page.words.lower()


def test_a_folder_is_no_file_to_write_a_report_to(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        write_report(runs, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_run(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage; its maps are laid out without t-SNE, which is most of a page's time."""
    monkeypatch.setattr("torchrec_em3.report_maps.project", lambda vectors, seed: np.zeros((len(vectors), 2)))
    shutil.copytree(runs[1], tmp_path / "em3")
    return tmp_path / "em3"


def test_every_section_is_there_with_the_runs_numbers(page, runs):
    assert "Content helped" in page.words
    for title in (
        "Is it more than chance?",
        "Cold start",
        "Content and ID",
        "Runs",
        "Slices of the test rows",
        "Curves",
        "Reliability",
        "Embeddings",
        "Sharding plan",
        "Data",
    ):
        assert title in page.words
    for run in runs:
        test = json.loads((run / "summary.json").read_text())["test"]
        for value in (test["auc"], test["gauc"], test["ne"], test["logloss"], test["attainable_auc"]):
            assert f"{value:.4f}" in page.words
        for part in test["slices"]["item_frequency"].values():
            assert f"{part['n']:,}" in page.words
    assert "By events of the user before the row" in page.words
    for words in ("(1.24", "1.40 GiB", "189 k", "tiny_text", "Content bank: coverage", "cosine of cached and fresh"):
        assert words in page.words
    assert "model.content" in page.words
    assert "2.13.0" in page.words
    assert "What is missing" not in page.words


def test_the_page_needs_no_network_and_no_script(page):
    assert "script" not in page.tags
    assert not {"img", "link", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in page.words
    assert "@import" not in page.words
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    first, second = (write_report(runs, tmp_path / name).read_text() for name in ("a.html", "b.html"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_texts_from_data_and_runs_are_escaped(runs, data, tmp_path):
    evil = "<script>alert('x')</script>"
    folder = tmp_path / "data"
    shutil.copytree(data.folder, folder)
    items = pq.read_table(folder / "items.parquet")
    for column in ("title", "category"):
        items = items.set_column(items.schema.get_field_index(column), column, [[evil] * len(items)])
    pq.write_table(items, folder / "items.parquet")
    run = tmp_path / "<b>run"
    shutil.copytree(runs[1], run)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"note": evil}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "plan.txt").write_text(evil)
    page = Page(write_report([runs[0], run], tmp_path / "report.html", folder))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.words.count(evil) > 100
    assert "<b>run" in page.words


MISSING = [
    ("summary.json", "stopped before its evaluation"),
    ("metrics.jsonl", "there are no curves"),
    ("embeddings.npz", "no map of its items"),
    ("predictions/test.npz", "reliability cannot be shown"),
    ("plan.json", "sharding plan is not known"),
    ("versions.json", "versions are not known"),
    ("tensorboard", "no TensorBoard events"),
]


@pytest.mark.parametrize(("name", "sentence"), MISSING)
def test_a_missing_piece_leaves_a_sentence(one_run, runs, tmp_path, name, sentence):
    path = one_run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for together in ([one_run], [runs[0], one_run]):
        page = Page(write_report(together, tmp_path / "report.html"))
        assert sentence in page.words.split("What is missing")[1]


SECTIONS = [
    ("predictions/test.npz", "Cold start", "there is no cold-start curve"),
    ("predictions/test.npz", "Is it more than chance?", "Not tested: it takes two seeds"),
    ("embeddings.npz", "Content and ID", "the cosines of content and ID cannot be shown"),
]


@pytest.mark.parametrize(("name", "section", "sentence"), SECTIONS)
def test_a_section_without_its_data_is_a_sentence(one_run, runs, tmp_path, name, section, sentence):
    (one_run / name).unlink()
    others = runs[:1] if section != "Cold start" else []  # any other run has a curve of its own
    page = Page(write_report([*others, one_run], tmp_path / "report.html"))
    assert sentence in page.words.split(section)[1]


@pytest.mark.parametrize("name", [name for name, _ in MISSING if name != "tensorboard"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_piece_leaves_a_sentence(one_run, tmp_path, name, damage):
    path = one_run / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"\xff\xfe\x00[1, 2")
    page = Page(write_report([one_run], tmp_path / "report.html"))
    assert path.name in page.words.split("What is missing")[1]


def test_an_interrupted_run_shows_its_curves(one_run, tmp_path):
    for path in list(one_run.iterdir()):
        if path.name not in ("config.yaml", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with (one_run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1020, "phase": "train", "rank_loss": NaN, "samples": 1044480}\n{"step": 1040, "ep')
    page = Page(write_report([one_run], tmp_path / "report.html"))
    assert "No run has been evaluated yet" in page.words
    assert "Training: ranking loss" in page.words
    assert "1 of 57 lines" in page.words
    assert not [value for _, value in page.attributes if value and "nan" in value]


def test_logits_that_are_not_finite_are_refused_not_averaged(one_run, tmp_path):
    with np.load(one_run / "predictions" / "test.npz") as arrays:
        columns = dict(arrays)
    columns["logit"][3] = np.nan
    np.savez(one_run / "predictions" / "test.npz", **columns)
    assert "not finite" in Page(write_report([one_run], tmp_path / "report.html")).words


def test_a_lone_run_says_what_is_needed_for_a_verdict(runs, tmp_path):
    assert "no run with content" in Page(write_report(runs[:1], tmp_path / "a.html")).words
    assert "--model.content none" in Page(write_report(runs[1:], tmp_path / "b.html")).words


def test_data_that_has_moved(one_run, data, tmp_path):
    config = yaml.safe_load((one_run / "config.yaml").read_text()) | {"data": str(tmp_path / "gone")}
    (one_run / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report([one_run], tmp_path / "report.html"))
    assert "the prepared folder cannot be shown" in page.words
    page = Page(write_report([one_run], tmp_path / "report.html", data.folder))
    assert "the prepared folder cannot be shown" not in page.words
    assert "share its category" in page.words
    with pytest.raises(DataError, match="not a prepared folder"):
        write_report([one_run], tmp_path / "report.html", tmp_path / "gone")


def test_what_is_not_a_run_is_named_in_one_line(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.yaml").write_text("just words")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("a: [1,\n b: !!python/object/apply:os.system ['x']")
    for folder in ("notes", "missing", "odd", "bad"):
        with pytest.raises(DataError, match=folder) as caught:
            write_report([tmp_path / folder], tmp_path / "report.html")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="at least one"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_runs_of_the_same_name_are_told_apart(runs, tmp_path):
    for place in ("first", "second"):
        shutil.copytree(runs[0], tmp_path / place / "run")
    page = Page(write_report([tmp_path / "first" / "run", tmp_path / "second" / "run"], tmp_path / "report.html"))
    assert "first/run" in page.words
    assert "second/run" in page.words


def test_what_ranks_took_stands_beside_their_plan(data: PreparedData, tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, data, content=False, world_size=2) for name in ("a", "b")]
    plan = json.loads((runs[0] / "plan.json").read_text())
    taken = {"table_bytes": 3 * 2**20, "peak_rss_bytes": 5 * 2**30, "peak_device_bytes": None, "steps": 7}
    taken |= {"step_ms": 43.2, "loading_ms": 1.0, "computing_ms": 42.2, "processor_ms": 40.0}
    plan["ranks"] = [{**rank, "table_bytes": 2**20} for rank in plan["ranks"]]
    plan |= {"budget": {"fixed_bytes": 0}, "measured": [{"rank": rank, **taken} for rank in range(2)]}
    (runs[1] / "plan.json").write_text(json.dumps(plan))
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "Planned and measured in b" in page
    assert "Planned and measured in a" not in page
    assert page.count("<td>5.00 GiB</td>") == page.count("<td>43.2</td>") == 2
