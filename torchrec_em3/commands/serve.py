"""`em3 serve`: scores over HTTP."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import CommandParser

DESCRIPTION = "Score over HTTP with a package: POST /score and /reload, GET /health, /metrics and /openapi.json."
MAX_PORT = 65535


def main(arguments: Sequence[str]) -> None:
    """Run `em3 serve`."""
    parser = CommandParser("serve", DESCRIPTION)
    parser.add_argument("package", type=str, help="Folder that `em3 export` wrote, or a link to one.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on.")
    parser.add_argument("--max_candidates", type=int, default=5000, help="Candidates of a request.")
    parser.add_argument("--max_history", type=int, default=1000, help="Items of a request's history.")
    parser.add_argument("--max_body_bytes", type=int, default=1 << 20, help="Bytes of a request's body.")
    parser.add_argument("--read_seconds", type=float, default=5.0, help="Seconds in which a body must have arrived.")
    parser.add_argument("--max_waiting", type=int, default=128, help="Requests that wait; one more is refused.")
    parser.add_argument("--concurrency", type=int, default=os.cpu_count() or 1, help="Threads that score.")
    values = parser.parse(arguments)
    for name in ("max_candidates", "max_body_bytes", "read_seconds", "max_waiting", "concurrency"):
        if getattr(values, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(values, name)}, must be positive")
    if values.max_history < 0:
        raise ConfigError(f"--max_history is {values.max_history}, must be 0 or more")
    if not 0 <= values.port <= MAX_PORT:
        raise ConfigError(f"--port is {values.port}, must be 0 to {MAX_PORT}")
    try:
        import uvicorn

        from torchrec_em3.serving.service import Limits, create_app
    except ImportError as error:
        raise ConfigError(f"em3 serve needs more packages ({error}); run: pip install torchrec-em3[serve]") from error
    # Requests run side by side, each on one core.
    torch.set_num_threads(1)
    limits = Limits(
        body_bytes=values.max_body_bytes,
        read_seconds=values.read_seconds,
        candidates=values.max_candidates,
        history=values.max_history,
        concurrency=values.concurrency,
        waiting=values.max_waiting,
    )
    uvicorn.run(create_app(Path(values.package), limits), host=values.host, port=values.port, access_log=False)
