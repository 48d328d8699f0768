"""The package imports the same way under every launcher, and never installs a top-level `datasets`."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTS = "import torchrec_em3.components.interfaces, torchrec_em3.datasets.raw; print('imported')"


def python(*arguments: str, cwd: Path, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_from_the_root_and_from_elsewhere(tmp_path: Path) -> None:
    assert "imported" in python("-c", IMPORTS, cwd=ROOT)
    assert "imported" in python("-c", IMPORTS, cwd=tmp_path)


def test_a_real_package_called_datasets_wins_over_the_folder(tmp_path: Path) -> None:
    """As Hugging Face's does, also where the checkout comes first on the path."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("Dataset = 'the real one'\n")
    program = "import torchrec_em3.datasets.raw; import datasets; print(datasets.Dataset)"
    assert "the real one" in python("-c", program, cwd=ROOT, path=str(tmp_path))


def test_module_launch_prints_the_version(tmp_path: Path) -> None:
    for cwd in (ROOT, tmp_path):
        assert "torchrec-em3" in python("-m", "torchrec_em3", "--version", cwd=cwd)
    console_script = Path(sys.executable).with_name("em3")
    assert subprocess.run([console_script, "--version"], check=True, capture_output=True).stdout


@pytest.mark.slow
def test_the_wheel_holds_one_top_level_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"torchrec_em3"}
    for expected in (
        "torchrec_em3/components/towers/qformer.py",
        "torchrec_em3/datasets/loader.py",
        "torchrec_em3/torchx_specs/train.py",
        "torchrec_em3/configs/movielens.yaml",
        "torchrec_em3/templates/report.html",
        "torchrec_em3/py.typed",
    ):
        assert expected in names
    check = "import torchrec_em3; print(torchrec_em3.__file__); " + IMPORTS
    printed = python(
        "-S", "-c", f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *site_paths()]!r}; {check}", cwd=tmp_path
    )
    assert str(tmp_path / "site") in printed


def site_paths() -> list[str]:
    return [path for path in sys.path if "site-packages" in path]


def test_torchrun_lets_every_option_of_train_through() -> None:
    """torchrun's parser refuses what abbreviates two of its own options, even behind the module's name."""
    from torch.distributed.run import get_args_parser

    options = [
        "--config",
        "c",
        "--data",
        "d",
        "--run_folder",
        "r",
        "--seed",
        "1",
        "--resume",
        "--overwrite",
        "--plugins",
        "p",
    ]
    options += [
        "--model.content",
        "none",
        "--train.epochs",
        "1",
        "--loader.batch_size",
        "8",
        "--embeddings.sharding",
        "auto",
    ]
    parsed = get_args_parser().parse_args(["--nproc_per_node", "2", "-m", "torchrec_em3", "train", *options])
    assert parsed.training_script_args == ["train", *options]


@pytest.mark.slow
def test_torchrun_launches_the_module(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "torchrec_em3",
        "--version",
    ]
    for cwd in (ROOT, tmp_path):
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("torchrec-em3") == 2
