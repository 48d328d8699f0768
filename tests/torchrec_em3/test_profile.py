"""`em3 profile`: its parts cover the step, are the model's, and nothing but RUN/profile is written."""

import gzip
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from tests.coded_data import prepare_coded
from torchrec_em3.cli import run
from torchrec_em3.parsing import read_config
from torchrec_em3.profiling import MODEL_PARTS, PARTS, _Tally

SMALL = ["--loader.batch_size", "128", "--model.embedding_dim", "8", "--steps", "3", "--warm_up", "1"]
CONTENT_PARTS = {part for part, path in MODEL_PARTS if path.split(".")[0] in ("content", "codes", "alignment")}
TRAINED_ENCODERS = {"encoders"}
"""Parts that the profiled model lacks: its encoders are frozen."""


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(table: str) -> dict[str, list[str]]:
    """Return the cells of a Markdown table by the first one."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in (row for row in cells if len(row) > 1)}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("em3")
    data = prepare_coded(tmp_path_factory.mktemp("coded"), encoders=True)
    before = digest(data)
    whole = ["--model.similarity", "both", "--model.codes", "features"]
    assert run(["profile", "--data", str(data), "--run", str(folder), *SMALL, *whole]) == 0
    assert digest(data) == before
    return folder


def test_the_parts_add_up_to_the_step(profiled: Path) -> None:
    text = (profiled / "profile" / "profile.md").read_text()
    parts = rows_of(text[: text.index("heaviest")])
    whole = parts.pop("all")
    step = re.search(r"A step takes ([\d.]+) CPU seconds per 1,000 samples", text)
    assert step is not None
    assert whole[2:] == [step.group(1), "100.0%"]
    known = {name: [float(cell) for cell in cells[:3]] for name, cells in parts.items() if name in PARTS}
    assert sum(both for _, _, both in known.values()) == pytest.approx(float(whole[2]), abs=1e-4 * len(known))
    assert all(both == pytest.approx(forward + backward, abs=1.1e-4) for forward, backward, both in known.values())
    assert known.keys() == set(PARTS) - TRAINED_ENCODERS


def test_backward_time_goes_to_the_part_that_made_the_nodes(profiled: Path) -> None:
    parts = rows_of((profiled / "profile" / "profile.md").read_text())
    backward = {name: float(cells[1]) for name, cells in parts.items() if name in PARTS}
    assert all(backward[part] == 0 for part in ("loader", "distinct items", "token fetch", "bank read", "optimizer"))
    assert all(
        backward[part] > 0
        for part in ("ID lookup", "ID attention", "tower", "content attention", "content similarity", "ranker")
    )
    # Every node of this model is some part's.
    assert float(parts["backward, rest"][1]) == 0


def test_the_trace_is_json_with_the_parts_in_it(profiled: Path) -> None:
    with gzip.open(profiled / "profile" / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"em3: {part}" for part, _ in MODEL_PARTS if part not in TRAINED_ENCODERS} <= names


def test_only_the_profile_is_written(profiled: Path) -> None:
    assert digest(profiled).keys() == {f"profile/{name}" for name in ("profile.md", "trace.json.gz", "config.yaml")}
    assert read_config(profiled / "profile" / "config.yaml").loader.batch_size == 128


def test_id_only_has_no_content_parts(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["profile", "--data", str(tiny_data), "--run", str(tmp_path), "--model.content", "none"]
    assert run([*base, *SMALL]) == 0
    printed = capsys.readouterr().out
    shown = rows_of(printed).keys() & set(PARTS)
    assert not shown & CONTENT_PARTS
    assert shown == set(PARTS) - CONTENT_PARTS
    assert (tmp_path / "profile" / "profile.md").read_text() in printed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_a_compiled_ranker_is_still_a_part(tiny_data: Path, tmp_path: Path) -> None:
    base = ["profile", "--data", str(tiny_data), "--run", str(tmp_path), "--train.compile_ranker", "true"]
    assert run([*base, *SMALL]) == 0
    text = (tmp_path / "profile" / "profile.md").read_text()
    forward, backward = (float(cell) for cell in rows_of(text)["ranker"][:2])
    assert forward > 0
    assert backward > 0
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        assert "CompiledFunctionBackward" in file.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0, must be at least 1"),
        (["--steps", "many"], "steps.*many"),
        (["--warm_up", "-1"], "--warm_up is -1, must be at least 0"),
        (["--run", ""], "no run folder: give --run DIR"),
        (["--stepps", "3"], "Did you mean '--steps'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(["profile", "--data", str(tiny_data), "--run", str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)
    assert not folder.exists()


def event(name: str, start: int, end: int, *, thread: int = 1, sequence: int = -1, forward: int = 0) -> FunctionEvent:
    return FunctionEvent(
        id=start, name=name, thread=thread, start_us=start, end_us=end, sequence_nr=sequence, fwd_thread=forward,
        device_type=DeviceType.CPU, is_user_annotation=name.startswith(("em3: ", "ProfilerStep")),
    )  # fmt: skip


def test_nodes_in_a_thread_of_their_own_are_taken_from_the_waiting_one() -> None:
    """As on CUDA, where autograd has a thread for each device."""
    step, ranker = event("ProfilerStep#1", 0, 100), event("em3: ranker", 10, 30)
    product = event("aten::mm", 10, 25, sequence=7)
    backward = event("em3: backward, rest", 40, 90)
    node = event("autograd::engine::evaluate_function: MmBackward0", 45, 85, thread=2, sequence=7, forward=1)
    for parent, child in ((step, ranker), (ranker, product), (step, backward)):
        parent.append_cpu_child(child)
        child.set_cpu_parent(parent)
    tally = _Tally([step, ranker, product, backward, node])
    parts = {part.part: (round(part.forward * 1e6), round(part.backward * 1e6)) for part in tally.parts()}
    assert parts == {"ranker": (20, 40), "backward, rest": (10, 0), "step, rest": (30, 0)}
    assert round(tally.seconds * 1e6) == 100
    assert [(operator.name, operator.calls) for operator in tally.operators()] == [("aten::mm", 1)]
