"""The files in deploy/ against what they refer to, without Docker or a cluster."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes.client import ApiClient

import torchrec_em3

ROOT = Path(torchrec_em3.__file__).parents[1]
MANIFESTS = [
    (path.name, document["kind"], document)
    for path in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


@pytest.mark.parametrize(("file", "kind", "document"), MANIFESTS, ids=[f"{m[0]}-{m[1]}" for m in MANIFESTS])
def test_every_field_is_one_that_kubernetes_knows(file: str, kind: str, document: dict[str, object]) -> None:
    client = ApiClient()
    model = client.deserialize(SimpleNamespace(data=json.dumps(document)), f"V1{kind}")
    assert client.sanitize_for_serialization(model) == document


def test_the_image_has_what_the_commands_of_the_manifests_need() -> None:
    commands = {container["command"][1] for container in _containers([document for _, _, document in MANIFESTS])}
    assert "serve" in commands
    assert "-r requirements/serve.txt" in (ROOT / "deploy" / "Dockerfile").read_text()


def _containers(tree: object) -> list[dict[str, list[str]]]:
    """Return whatever has a command, at any depth."""
    if isinstance(tree, list):
        return [found for part in tree for found in _containers(part)]
    if not isinstance(tree, dict):
        return []
    own = [tree] if tree.get("command", [""])[0] == "em3" else []
    return own + _containers(list(tree.values()))


def test_the_image_copies_what_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--)(\S+) ", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    kept = re.findall(r"^!(\S+)$", (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(copied) - {"."} <= set(kept)
    assert all((ROOT / name).exists() for name in kept)
    assert {"setup.py", "pyproject.toml", "README.md", "torchrec_em3", "components", "datasets", "configs"} <= set(kept)
