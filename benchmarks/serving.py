"""What serving costs: a package against the training forward, together or one by one, over HTTP, and under fuzz.

    python benchmarks/serving.py RUN PACKAGE [--data DATA] [--aot true] [--http false]

RUN is the run that PACKAGE was exported from. In the first two parts all ways take turns in one process, so that their
ratio does not depend on what else the machine does. The HTTP parts start `em3 serve` as a process of its own.
"""

import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch._inductor
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonargparse import auto_cli
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.batch import HISTORY, TARGET, Batch
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.evaluate import refresh_bank
from torchrec_em3.process_group import process_group
from torchrec_em3.serving.package import GRAPH_FILE
from torchrec_em3.serving.scorer import Request, Scorer
from torchrec_em3.trained_run import open_trained_run

PORT = 8765
BATCHED = 8
"""Requests that are scored together to see whether that pays."""


def main(
    run: str,
    package: str,
    data: str = "",
    candidates: int = 1000,
    history: int = 50,
    concurrency: int = 2,
    repeats: int = 100,
    clients: int = 4,
    seconds: float = 30.0,
    fuzz: int = 10_000,
    aot: bool = False,
    http: bool = True,
) -> None:
    """Print times, memory and the answers to fuzzed requests.

    Args:
        run: Run folder.
        package: Package of that run.
        data: Prepared folder, if it has moved since training.
        candidates: Candidates of a request.
        history: Items of its history.
        concurrency: Requests at a time in the HTTP parts, a thread each; the first two parts have one thread.
        repeats: Turns of each way.
        clients: Connections that send requests, each as soon as it has the answer to its last.
        seconds: How long they do.
        fuzz: Fuzzed requests.
        aot: Compile the package's graph by AOTInductor, which needs a C++ compiler, and let it take turns, too.
        http: Whether to do the HTTP parts.
    """
    scorer = Scorer.load(Path(package))
    with process_group() as ranks:
        torch.set_num_threads(1)
        trained = open_trained_run(Path(run), ranks, data)
        refresh_bank(trained.sharded, ranks)
        trained.sharded.module.eval()
        request, batch = make_request(trained.data, candidates, history)
        print(f"{scorer.config.version}, {candidates} candidates, history {history}, one thread")
        ways: dict[str, Callable[[], Any]] = {
            "training forward": torch.no_grad()(lambda: trained.sharded.module(batch)[1].logit.numpy()),
            "package": lambda: scorer.logits([request])[0],
        }
        if aot:
            compiled = Scorer.load(Path(package))
            started = time.perf_counter()
            compiled._graph = compile_graph(Path(package), scorer, request)
            print(f"AOTInductor compiled in {time.perf_counter() - started:.0f} s on the wall")
            ways["AOTInductor"] = lambda: compiled.logits([request])[0]
            for size in (1, 7, candidates):
                part = Request(request.user, request.history[: min(size, history)], request.candidates[:size])
                change = np.abs(compiled.logits([part])[0] - scorer.logits([part])[0]).max()
                print(f"AOTInductor, {size} candidates: largest difference of a logit to the package {change:.2g}")
        difference = np.abs(ways["package"]() - ways["training forward"]()).max()
        print(f"largest difference of a logit: {difference:.2g}")
        show(take_turns(ways, repeats))
        for name, way in ways.items():
            print(f"{name}: a thread that sleeps 1 ms meanwhile waits {longest_wait(way) * 1000:.1f} ms at most")
    if not http:
        return
    for size in (10, candidates):
        part = Request(request.user, request.history, request.candidates[:size])
        print(f"\n{BATCHED} requests of {size} candidates")
        together: dict[str, Callable[[], Any]] = {
            "one by one": partial(_one_by_one, scorer, part),
            "together": partial(scorer.logits, [part] * BATCHED),
        }
        show(take_turns(together, repeats))
    with service(package, concurrency) as process:
        measure_http(request, process, clients, seconds)
        print(f"\nfuzz: {fuzz} requests; answers by status: {dict(sorted(send_fuzz(fuzz).items()))}")
        print(f"memory after fuzz {process.memory_info().rss / 2**20:.0f} MiB, running: {process.is_running()}")


def _one_by_one(scorer: Scorer, request: Request) -> None:
    for _ in range(BATCHED):
        scorer.logits([request])


def longest_wait(way: Callable[[], Any]) -> float:
    """Return the longest time, in seconds, in which another thread that often wants to run did not."""
    done = threading.Event()
    waits = [0.0]

    def wake_up() -> None:
        while not done.is_set():
            started = time.perf_counter()
            time.sleep(0.001)
            waits.append(time.perf_counter() - started)

    other = threading.Thread(target=wake_up)
    other.start()
    for _ in range(20):
        way()
    done.set()
    other.join()
    return max(waits)


def compile_graph(package: Path, scorer: Scorer, request: Request) -> Callable[..., torch.Tensor]:
    """Return a package's graph as AOTInductor compiles it, for any number of candidates like the graph itself."""
    graph = scorer._graph
    seen: list[tuple[torch.Tensor | None, ...]] = []

    def keep(*inputs: torch.Tensor | None) -> torch.Tensor:
        seen.append(inputs)
        return graph(*inputs)

    scorer._graph = keep
    scorer.logits([request, request])
    scorer._graph = graph
    program = torch.export.load(package / GRAPH_FILE)
    # A package holds no examples; the compiler wants some, and keeps the dimensions as dynamic as they are.
    program.example_inputs = (tuple(None if each is None else each.clone() for each in seen[0]), {})
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/graph.pt2")
        return torch._inductor.aoti_load_package(path)


def make_request(data: PreparedData, candidates: int, history: int) -> tuple[Request, Batch]:
    """Return a request of random items, and the batch in which training would see it."""
    random = np.random.default_rng(0)
    item_K, item_L = (random.integers(1, data.known_items + 1, size) for size in (candidates, history))
    ids = data.items["raw_id"].to_pylist()
    request = Request(data.users["raw_id"][1].as_py(), [ids[item] for item in item_L], [ids[item] for item in item_K])
    user_FK = np.repeat([[1], *data.user_features[1][:, None]], candidates, axis=1)
    values = np.concatenate([user_FK.ravel(), item_K, np.tile(item_L, candidates)])
    lengths = np.concatenate([np.ones(user_FK.size + candidates), np.full(candidates, history)])
    sparse = KeyedJaggedTensor(
        [*data.user_feature_names, TARGET, HISTORY], torch.from_numpy(values), lengths=torch.from_numpy(lengths).long()
    )
    one_K = torch.ones(candidates)
    return request, Batch(sparse, torch.empty(candidates, 0), one_K, one_K, one_K.long())


def take_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of each way by turn, on the wall and of CPU, after some turns to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(-5, repeats):
        for name, way in ways.items():
            started, cpu = time.perf_counter(), time.process_time()
            way()
            if turn >= 0:
                taken[name].append((time.perf_counter() - started, time.process_time() - cpu))
    return taken


def show(taken: dict[str, list[tuple[float, float]]]) -> None:
    """Print a line for each way."""
    for name, times in taken.items():
        seconds, cpu = np.array(times).T
        p50, p99 = np.percentile(seconds, [50, 99]) * 1000
        print(
            f"{name:<18}{p50:8.2f} ms p50 {p99:8.2f} ms p99 {1 / seconds.mean():8.1f} a second "
            f"{np.median(cpu) * 1000:8.2f} ms CPU"
        )


@contextmanager
def service(package: str, concurrency: int) -> Iterator[psutil.Process]:
    """Run `em3 serve`."""
    arguments = ["serve", package, "--port", str(PORT), "--concurrency", str(concurrency)]
    with subprocess.Popen([sys.executable, "-m", "torchrec_em3", *arguments], stderr=subprocess.DEVNULL) as process:
        try:
            while ask(http.client.HTTPConnection("127.0.0.1", PORT), "GET", "/health", b"") != 200:
                time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes) -> int:
    """Return the status of the answer, or 0 if there is none."""
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0
    return answer.status


def measure_http(request: Request, process: psutil.Process, clients: int, seconds: float) -> None:
    """Print the times that clients see, and the memory of the service as they go on."""
    body = json.dumps({"user": request.user, "history": request.history, "candidates": request.candidates}).encode()
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    end = time.perf_counter() + seconds

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT)
        while time.perf_counter() < end:
            started = time.perf_counter()
            statuses[ask(connection, "POST", "/score", body)] += 1
            taken.append(time.perf_counter() - started)

    senders = [threading.Thread(target=send) for _ in range(clients)]
    for sender in senders:
        sender.start()
    memory = []
    for _ in range(5):
        time.sleep(seconds / 5)
        memory.append(f"{process.memory_info().rss / 2**20:.0f}")
    for sender in senders:
        sender.join()
    p50, p99 = np.percentile(taken, [50, 99]) * 1000
    print(f"\nHTTP, {clients} clients: {len(taken) / seconds:.1f} a second, {p50:.1f} ms p50, {p99:.1f} ms p99")
    print(f"answers by status: {dict(statuses)}; memory in MiB, at fifths of the time: {', '.join(memory)}")
    print(f"scored together: {scored_together():.1f} requests on average")


def scored_together() -> float:
    """Return how many requests the service has scored at once, on average."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.request("GET", "/metrics")
    lines = [line.split() for line in connection.getresponse().read().decode().splitlines()]
    value = {line[0]: float(line[1]) for line in lines if line[0].startswith("em3_requests_together_")}
    return value["em3_requests_together_sum"] / value["em3_requests_together_count"]


def send_fuzz(count: int) -> Counter[int]:
    """Send requests of any kind and return how many got which status; 0 is no answer."""
    anything = st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    )
    identifier = st.text(max_size=8) | st.integers(-(2**65), 2**65)
    identifiers = st.lists(identifier, max_size=50) | st.integers(0, 100_000).map(lambda size: ["1"] * size)
    plain = st.text(max_size=8) | st.integers(0, 5000)
    right = st.fixed_dictionaries(
        {"user": plain, "history": st.lists(plain), "candidates": st.lists(plain, min_size=1, max_size=200)}
    )
    nearly = st.fixed_dictionaries(
        {"user": identifier | anything, "history": identifiers | anything, "candidates": identifiers | anything},
        optional={"features": anything, "more": anything},
    )
    nested = st.integers(1, 100_000).map(lambda depth: b"[" * depth)
    content = (right | nearly | anything).map(json.dumps).map(str.encode) | st.binary(max_size=500) | nested
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(body=content)
    def send(body: bytes) -> None:
        statuses[ask(connection, "POST", "/score", body)] += 1

    send()
    return statuses


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
