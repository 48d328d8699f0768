"""The structure holds: who may import whom, and files and functions that fit in a head."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("torchrec_em3", "components", "datasets", "torchx_specs")
LEAVES = {"torchrec_em3", "torchrec_em3.batch", "torchrec_em3.errors", "torchrec_em3.registry", "torchrec_em3.schema"}
"""Modules that every folder but torchx_specs may import."""
MAY_IMPORT = {
    "components": (*LEAVES, "torchrec_em3.components"),
    "datasets": (
        *LEAVES,
        "torchrec_em3.datasets",
        "torchrec_em3.components.encoders",
        "torchrec_em3.components.interfaces",
    ),
    "torchrec_em3": ("torchrec_em3",),
    "torchx_specs": (),
}
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70

SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST) -> list[str]:
    """Modules of this project that a file imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return [name for name in names if name.split(".")[0] in FOLDERS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        allowed = MAY_IMPORT[folder]
        exact = name in LEAVES and name in allowed
        below = any(name == entry or name.startswith(entry + ".") for entry in allowed if entry != "torchrec_em3")
        assert exact or below or folder == "torchrec_em3", f"{path} imports {name}"
        assert not (folder == "torchrec_em3" and name.startswith("torchrec_em3.torchx_specs"))


def test_leaves_import_only_leaves() -> None:
    for name in sorted(LEAVES - {"torchrec_em3"}):
        path = ROOT / (name.replace(".", "/") + ".py")
        assert set(imports(ast.parse(path.read_text(encoding="utf-8")))) <= LEAVES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} in {path}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates_what_it_reads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for forbidden in ("pickle.load", "allow_pickle=True", "yaml.load(", "eval(compile"):
        assert forbidden not in text
    assert text.count("torch.load(") == text.count("weights_only=True")


def test_no_package_in_the_folders_could_hide_another() -> None:
    """A regular package called datasets at the root would hide Hugging Face's under python -m and pytest."""
    for folder in ("components", "datasets", "torchx_specs"):
        assert not list((ROOT / folder).rglob("__init__.py"))
