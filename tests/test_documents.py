"""Commands in README.md, docs/ and benchmarks/ are such as their programs take; the five minutes are run as written."""

import shlex
import shutil
from pathlib import Path

import pytest

from tests.documents import ROOT, Command, commands, documents, problem
from torchrec_em3.cli import run as em3

START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {command.text: problem(command) for command in commands(page.read_text(encoding="utf-8"))}
    assert {text: wrong for text, wrong in found.items() if wrong is not None} == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("em3 trian --data d", "unknown command 'trian'"),
        ("em3 train --data d --run r --model.contnt none", "--model.contnt"),
        ("em3 train --data d --run r --model.content_options.num_querys 2", "num_querys"),
        ("em3 train --config configs/movielense.yaml", "movielense"),
        ("em3 train --data d --loader.batch_size many", "many"),
        ("em3 shard data --count 5", "required: out"),
        ("em3 embed RUN [--outt DIR]", "em3 embed has no option --outt"),
        ("em3 prepare movielens --source DIR --out DATA [--splits temporal]", "--splits"),
        ("torchrun --procs 2 -m torchrec_em3 train --run_folder r", "--procs"),
        ("torchrun --nproc_per_node 2 -m torchrec_em3 train --run_folder r --trian.epochs 1", "--trian.epochs"),
        ("torchrun --nproc_per_node 2 docs/examples/no_such.py", "no_such.py is not there"),
        ("torchx run -s local_cwd torchx_specs/train.py:trian --run r", "trian"),
        ("torchx run -s local_cwd torchx_specs/train.py:evaluate --run r --dta d", "--dta"),
        ("python benchmarks/no_such.py", "no_such.py is not there"),
        ("python benchmarks/loader.py --no_such 1", "no_such"),
        ("make tests", "no target tests"),
        ("pip install torchrec-em3[sreve]", "no extra sreve"),
        ("docker build .", "does not begin with 'Not run'"),
    ],
)
def test_what_is_misspelt_or_was_renamed_is_found(text: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = commands(f"```\n{text}\n```\n\nThis builds it.\n")
    assert wrong in (problem(command) or "nothing")


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    page = "Say `em3 embed RUN` or\n\n```\nem3 export RUN \\\n    --out P\nOMP_NUM_THREADS=1 python x.py  # why\n```\n"
    page += "Not run.\n"
    page += "\n```\ntest AUC   all\n```\n\n```python\nem3 = 1\n```\n\n```\nem3 report RUN ...\n```\n"
    assert list(commands(page)) == [
        Command("em3 export RUN      --out P", usage=False, marked=True),
        Command("OMP_NUM_THREADS=1 python x.py  # why", usage=False, marked=True),
        Command("em3 report RUN ...", usage=True),
        Command("em3 embed RUN", usage=True),
    ]


@pytest.mark.slow
def test_the_five_minutes_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(command.text) for command in commands(START) if not command.usage]
    assert [words[0] for words in lines[:2]] == ["make", "."]
    for words in lines[2:]:
        assert em3(words[1:]) == 0, words
    assert (tmp_path / "runs" / "id_only" / "report.html").is_file()
    assert (tmp_path / "packages" / "em3" / "manifest.json").is_file()
