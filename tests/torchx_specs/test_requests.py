"""What each scheduler would be asked for, compared with files in tests/golden/torchx/; nothing is contacted.

EM3_GOLDEN=write python -m pytest tests/torchx_specs/test_requests.py      # writes them anew, to be read as a diff
"""

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.torchx_specs.components import component

GOLDEN = Path(__file__).parents[1] / "golden" / "torchx"
SCHEDULERS: dict[str, dict[str, Any]] = {
    "kubernetes": {"queue": "research", "namespace": "em3"},
    "slurm": {"partition": "gpu", "time": "12:00:00"},
    "aws_batch": {"queue": "research", "user": "someone"},
}
HOST = ["--image", "registry.example/em3:0.1", "--mounts", "type=volume,src=em3,dst=/em3"]
COMPONENTS = {
    "train": ["--config", "/em3/c.yaml", "--data", "/em3/data", "--run", "/em3/run", "-j", "2x8"]
    + ["--h", "aws_p4d.24xlarge", "--max_retries", "3", *HOST, "--", "--train.epochs", "2"],
    "evaluate": ["--run", "/em3/run", "-j", "1x2", "--cpu", "4", "--memMB", "16000", *HOST],
    "prepare": ["--kind", "movielens", "--out", "/em3/data", *HOST, "--", "--source", "/em3/ml-1m"],
    "serve": ["--package", "/em3/package", "--host", "0.0.0.0", "--replicas", "2", *HOST],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("LOGLEVEL", raising=False)


def normalised(request: str, name: str) -> str:
    """Return a request with a fixed suffix in place of the random one, and without the version of TorchX."""
    request = re.sub(rf"\b{name}-[a-z0-9]{{12,}}\b", f"{name}-SUFFIX", request)
    request = re.sub(r"(torchx\.pytorch\.org/version'?: )'?[\w.]+'?", r"\1VERSION", request)
    return re.sub(r"(torchx\.pytorch\.org/user'?: )'?[\w.-]+'?", r"\1USER", request).rstrip() + "\n"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_requests_are_as_reviewed(name: str, scheduler: str) -> None:
    file = "train" if name in ("train", "evaluate") else "process"
    request = normalised(component(file, name, COMPONENTS[name], scheduler, SCHEDULERS[scheduler])[1], name)
    path = GOLDEN / f"{name}.{scheduler}.txt"
    if os.environ.get("EM3_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(request)
    assert request == path.read_text()
