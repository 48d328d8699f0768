"""`em3 serve`: limits, anything a client may send, and a package that is swapped under load."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.torchrec_em3.packages import export, train
from torchrec_em3.cli import run as em3
from torchrec_em3.errors import NumericError
from torchrec_em3.serving.scorer import Request, Scorer
from torchrec_em3.serving.service import Limits, create_app

BODY = {"user": "1", "history": ["1", 2], "candidates": ["3", "4", "never seen"]}


@pytest.fixture(scope="module")
def package(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    return export(train(tiny_data, folder / "run"), folder / "package", "fp32")


@contextmanager
def serving(folder: Path, **limits: Any) -> Iterator[str]:
    """Serve a package on a free port of the loopback address; yields the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(folder, Limits(**limits)), log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(package: Path) -> Iterator[str]:
    with serving(package, candidates=100, history=50, body_bytes=10_000) as url:
        yield url


def test_scores_are_those_of_the_package(address: str, package: Path) -> None:
    answer = requests.post(f"{address}/score", json=BODY).json()
    scorer = Scorer.load(package)
    (expected,) = scorer.score([Request("1", ["1", "2"], BODY["candidates"])])
    assert answer["version"] == scorer.config.version
    np.testing.assert_allclose(answer["scores"], expected, rtol=1e-6)
    health = requests.get(f"{address}/health").json()
    assert health == {"version": scorer.config.version, "items": scorer.num_items}


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        ({"candidates": ["1"] * 101}, 422, "candidates: List should have at most 100"),
        ({"candidates": []}, 422, "candidates: List should have at least 1"),
        ({"history": [1] * 51}, 422, "history: List should have at most 50"),
        ({"user": None}, 422, "user"),
        ({"user": True}, 422, "user"),
        ({"user": "x" * 257}, 422, "user"),
        ({"user": float("nan")}, 422, "user"),
        ({"candidates": [10**30]}, 422, "candidates.0"),
        ({"history": [[["1"]]]}, 422, "history.0"),
        ({"features": {"shoe_size": "44"}}, 422, "no feature 'shoe_size'"),
        ({"candidate": ["1"]}, 422, "candidate: Extra inputs"),
        ({"user": "x" * 10_000}, 413, "longer than 10000 bytes"),
    ],
)
def test_what_is_refused(change: dict[str, Any], status: int, detail: str, address: str) -> None:
    answer = requests.post(f"{address}/score", data=json.dumps(BODY | change))
    assert answer.status_code == status
    assert detail in answer.json()["detail"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 9000, b'{"user":' * 1000, b'"\\ud800"', b"1" * 9000, b"NaN"]
)
def test_what_is_no_json_is_refused(content: bytes, address: str) -> None:
    assert requests.post(f"{address}/score", data=content).status_code == 422


def test_a_body_that_does_not_arrive_is_given_up(package: Path) -> None:
    with serving(package, read_seconds=0.5) as address:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n{")
            assert client.recv(100).startswith(b"HTTP/1.1 400 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
        assert requests.get(f"{address}/health").status_code == 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
)
ID = st.text(max_size=5) | st.integers(-(2**65), 2**65)
IDS = st.lists(ID, max_size=120)
NEARLY = st.fixed_dictionaries(
    {"user": ID | ANYTHING, "history": IDS | ANYTHING, "candidates": IDS | ANYTHING},
    optional={"features": ANYTHING, "more": ANYTHING},
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=(NEARLY | ANYTHING).map(json.dumps).map(str.encode) | st.binary(max_size=200))
def test_nothing_that_a_client_sends_is_an_error_of_the_service(content: bytes, address: str) -> None:
    answer = requests.post(f"{address}/score", data=content)
    assert answer.status_code in (200, 413, 422)
    if answer.status_code == 200:
        scores = answer.json()["scores"]
        assert len(scores) == len(json.loads(content)["candidates"])
        assert all(0 <= score <= 1 for score in scores)


def test_paths_and_methods_of_any_kind_do_not_become_labels(address: str) -> None:
    for method, path in (("GET", "/made-up"), ("DELETE", "/score"), ("POST", "/%00"), ("GET", "/metrics")):
        assert requests.request(method, address + path).status_code < 500
    text = requests.get(f"{address}/metrics").text
    assert 'em3_requests_total{path="/metrics",status="200"}' in text
    assert "made-up" not in text
    assert "em3_score_seconds_count" in text


def test_a_request_that_ends_in_an_error_is_counted(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(create_app(package), raise_server_exceptions=False)

    def fail(self: Scorer, requests: list[Request]) -> None:
        raise NumericError("a logit is not finite")

    monkeypatch.setattr(Scorer, "score", fail)
    answer = client.post("/score", json=BODY)
    assert (answer.status_code, answer.json()) == (500, {"detail": "NumericError"})
    assert 'em3_requests_total{path="/score",status="500"} 1.0' in client.get("/metrics").text


def test_openapi_says_what_is_taken(address: str) -> None:
    paths = requests.get(f"{address}/openapi.json").json()["paths"]
    assert paths.keys() == {"/score", "/reload", "/health", "/metrics"}
    schema = paths["/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["candidates"]["maxItems"] == 100
    assert schema["required"] == ["user", "history", "candidates"]


def test_too_many_requests_are_turned_away_and_the_others_served(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, gate = Scorer.score, threading.Event()
    statuses: list[int] = []
    with serving(package, concurrency=1, waiting=2) as url:
        monkeypatch.setattr(Scorer, "score", lambda self, requests: gate.wait(30) and score(self, requests))
        clients = [
            threading.Thread(
                target=lambda: statuses.append(requests.post(f"{url}/score", json=BODY, timeout=60).status_code)
            )
            for _ in range(10)
        ]
        for client in clients:
            client.start()
        while len(statuses) < 7:
            time.sleep(0.01)
        gate.set()
        for client in clients:
            client.join()
    assert sorted(statuses) == [200] * 3 + [429] * 7


def test_a_package_is_swapped_under_load_with_nothing_lost(package: Path, tmp_path: Path) -> None:
    """A client never gets an error or the scores of one package under the name of the other."""
    packages = [package, export(package.parent / "run", tmp_path / "fp16", "fp16")]
    scorers = [Scorer.load(folder) for folder in packages]
    request = Request("1", ["1", "2"], BODY["candidates"])
    expected = {scorer.config.version: scorer.score([request])[0] for scorer in scorers}
    link, stop = tmp_path / "current", threading.Event()
    link.symlink_to(packages[0])
    seen: list[str] = []
    problems: list[str] = []

    def load(url: str) -> None:
        with requests.Session() as client:
            while not stop.is_set():
                answer = client.post(f"{url}/score", json=BODY)
                if answer.status_code != 200:
                    problems.append(answer.text)
                    return
                body = answer.json()
                seen.append(body["version"])
                if not np.allclose(body["scores"], expected[body["version"]], rtol=1e-6):
                    problems.append(str(body))

    def wait_for_answers(count: int) -> None:
        enough = len(seen) + count
        while len(seen) < enough and not problems:
            time.sleep(0.01)

    with serving(link) as url:
        clients = [threading.Thread(target=load, args=(url,)) for _ in range(3)]
        for client in clients:
            client.start()
        for turn in range(1, 4):
            wait_for_answers(20)
            fresh = tmp_path / "fresh"
            fresh.symlink_to(packages[turn % 2])
            fresh.replace(link)
            answer = requests.post(f"{url}/reload", timeout=60)
            assert answer.json()["version"] == scorers[turn % 2].config.version
        wait_for_answers(20)
        fresh.symlink_to(tmp_path)
        fresh.replace(link)
        refused = requests.post(f"{url}/reload", timeout=60)
        assert (refused.status_code, "is no package" in refused.json()["detail"]) == (409, True)
        assert requests.post(f"{url}/score", json=BODY).json()["version"] == scorers[1].config.version
        stop.set()
        for client in clients:
            client.join()
    assert problems == []
    changes = [version for before, version in zip(["", *seen], seen, strict=False) if version != before]
    assert len(changes) >= 4


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"--max_candidates": "0", "--max_history": "-1", "--port": "65536"}
    for option, value in wrong.items():
        assert em3(["serve", str(tmp_path), option, value]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{option} is {value}, must be " in line
    assert em3(["serve", str(tmp_path)]) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
