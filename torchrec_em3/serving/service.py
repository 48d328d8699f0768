"""The HTTP service: POST /score and /reload, GET /health, /metrics and /openapi.json.

Everything a client can send is bounded: bytes and seconds of the body, candidates, history, requests that wait. A new
package is read beside the one in use and takes its place at once; what is being scored keeps the one it began with.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.requests import ClientDisconnect

from torchrec_em3.errors import CheckpointError
from torchrec_em3.serving.request_queue import QueueFullError, RequestQueue
from torchrec_em3.serving.scorer import Request, RequestError, Scorer

__all__ = ["Limits", "create_app"]

MAX_ID_LENGTH = 256
RETRY_SECONDS = "1"
TOGETHER_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
Name = Annotated[str, Field(max_length=MAX_ID_LENGTH)]
Id = Annotated[str, Field(max_length=MAX_ID_LENGTH)] | Annotated[int, Field(ge=-(2**63), lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service accepts.

    Attributes:
        body_bytes: Size of a request's body; more is 413.
        read_seconds: Time in which the body must have arrived; longer is 408.
        candidates: Candidates of a request; more is 422.
        history: Items of a history; more is 422.
        concurrency: Threads that score, each a request or several short ones at a time.
        waiting: Requests that wait for a thread; one more is 429.
    """

    body_bytes: int = 1 << 20
    read_seconds: float = 5.0
    candidates: int = 5000
    history: int = 1000
    concurrency: int = 2
    waiting: int = 128


class Scores(BaseModel):
    """Answer to POST /score: `scores[i]` is the probability of `candidates[i]`, by the main task.

    Where the package has several tasks, `other_scores` holds those of the others in the same form, by name.
    """

    version: str
    scores: list[float]
    other_scores: dict[str, list[float]] | None = None


class Health(BaseModel):
    """Answer to GET /health and POST /reload."""

    version: str
    items: int


class Problem(BaseModel):
    """Answer to a request that is refused."""

    detail: str


class _Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("em3_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.seconds = Histogram("em3_score_seconds", "Time of POST /score, waiting included.", registry=registry)
        self.candidates = Counter("em3_candidates", "Candidates scored.", registry=registry)
        self.together = Histogram(
            "em3_requests_together", "Requests scored together.", buckets=TOGETHER_BUCKETS, registry=registry
        )
        self.waiting = Gauge("em3_waiting", "Requests that wait for a thread.", registry=registry)
        self.package = Gauge("em3_package", "Package in use.", ["version"], registry=registry)


class _Service:
    """The package in use, the requests that wait for it and the numbers for /metrics."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.limits, self.metrics = limits, _Metrics()
        self.body = _body_model(limits)
        self._folder = folder
        self._reloading = asyncio.Lock()
        self._queue = RequestQueue(
            lambda: self.scorer, limits.concurrency, limits.waiting, self.metrics.together.observe
        )
        self.metrics.waiting.set_function(lambda: len(self._queue))
        self._use(_load(folder))

    def _use(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.metrics.package.clear()
        self.metrics.package.labels(scorer.config.version).set(1)

    async def reload(self) -> None:
        """Take the package that is now in the folder; the one in use stays if that one cannot be read."""
        async with self._reloading:
            self._use(await asyncio.to_thread(_load, self._folder))

    async def score(self, http: HttpRequest) -> Scores:
        started = time.perf_counter()
        request = self._parse(await self._read(http))
        try:
            scorer, score_K = await self._queue.score(request)
        except QueueFullError as error:
            detail = f"{self.limits.waiting} requests wait already; try again later"
            raise HTTPException(429, detail, {"Retry-After": RETRY_SECONDS}) from error
        except RequestError as error:
            raise HTTPException(422, error.reason) from error
        self.metrics.candidates.inc(len(score_K))
        self.metrics.seconds.observe(time.perf_counter() - started)
        return _answer(scorer, score_K)

    async def _read(self, http: HttpRequest) -> bytes:
        """Return the body, of which no more than the limit is ever held."""
        content = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in http.stream():
                    content += part
                    if len(content) > self.limits.body_bytes:
                        raise HTTPException(413, f"the body is longer than {self.limits.body_bytes} bytes")
        except TimeoutError as error:
            raise HTTPException(408, f"the body took longer than {self.limits.read_seconds} seconds") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the body ended early") from error
        return bytes(content)

    def _parse(self, content: bytes) -> Request:
        try:
            body: Any = self.body.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))[:MAX_ID_LENGTH] or "body"
            raise HTTPException(422, f"{where}: {first['msg']}") from error
        history, candidates = list(map(str, body.history)), list(map(str, body.candidates))
        return Request(str(body.user), history, candidates, body.features, body.dense)


def _answer(scorer: Scorer, score_K: NDArray[np.float32]) -> Scores:
    tasks = scorer.config.tasks
    main, *others = score_K.reshape(len(score_K), -1).T.tolist()
    other_scores = dict(zip(tasks[1:], others, strict=True)) if others else None
    return Scores(version=scorer.config.version, scores=main, other_scores=other_scores)


def _load(folder: Path) -> Scorer:
    # Where the folder is a link that is turned meanwhile, all files must still be of one package.
    scorer = Scorer.load(folder.resolve())
    # The first pass through a graph is slower, and shows whether it runs at all.
    scorer.score([Request("", [], [""])])
    return scorer


def _body_model(limits: Limits) -> type[BaseModel]:
    """Return the type of the body of POST /score."""
    return create_model(
        "ScoreRequest",
        __config__=ConfigDict(extra="forbid", strict=True),
        user=(Id, ...),
        history=(Annotated[list[Id], Field(max_length=limits.history)], ...),
        candidates=(Annotated[list[Id], Field(min_length=1, max_length=limits.candidates)], ...),
        features=(dict[Name, Id | bool], Field(default_factory=dict)),
        dense=(dict[Name, Annotated[float, Field(allow_inf_nan=False)]], Field(default_factory=dict)),
    )


def create_app(folder: Path, limits: Limits | None = None) -> FastAPI:
    """Return the service over a package.

    Args:
        folder: Package, or a link to one; read now and again at each POST /reload.
        limits: What to accept.

    Raises:
        CheckpointError: If it is no package, or damaged.
    """
    service = _Service(folder, limits or Limits())
    app = FastAPI(title="em3 scorer", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def count(http: HttpRequest, answer: Callable[[HttpRequest], Awaitable[Response]]) -> Response:
        status = 500
        try:
            response = await answer(http)
            status = response.status_code
        finally:
            # What a client makes up as a path must not become a label.
            route = http.scope.get("route")
            path = route.path if route is not None else "other"
            service.metrics.requests.labels(path, status).inc()
        return response

    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 408, 413, 422, 429)}
    schema = service.body.model_json_schema()
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post("/score", responses=problems, openapi_extra=body, response_model_exclude_none=True)
    async def score(http: HttpRequest) -> Scores:
        """Return the probability of each candidate, in their order, by the main task and by any others."""
        return await service.score(http)

    @app.post("/reload", responses={409: {"model": Problem}})
    async def reload() -> Health:
        """Take the package that is now in the service's folder; if it cannot be read, go on with the present one."""
        try:
            await service.reload()
        except CheckpointError as error:
            raise HTTPException(409, str(error)) from error
        return health()

    @app.get("/health")
    def health() -> Health:
        """Say which package is in use."""
        return Health(version=service.scorer.config.version, items=service.scorer.num_items)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Return counts and times for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Exception)
    async def fail(http: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": type(error).__name__}, 500)

    return app
