"""Components parsed as `torchx run` does, without running anything."""

import os
import shlex
from typing import Any

from torchx.runner import get_runner
from torchx.specs import AppDef

import torchrec_em3

__all__ = ["arguments_of", "component"]

FOLDER = os.path.join(os.path.dirname(os.path.dirname(torchrec_em3.__file__)), "torchx_specs")


def component(
    file: str, name: str, arguments: list[str], scheduler: str = "local_cwd", cfg: dict[str, Any] | None = None
) -> tuple[AppDef, str]:
    """Return the application of `torchx_specs/FILE.py:NAME` and the scheduler's request as text."""
    with get_runner("test") as runner:
        info = runner.dryrun_component(f"{FOLDER}/{file}.py:{name}", arguments, scheduler, cfg=cfg or {})
        assert info._app is not None
        return info._app, str(info)


def arguments_of(app: AppDef) -> list[str]:
    """Return what follows `-m torchrec_em3`, behind torchrun or behind python."""
    role = app.roles[0]
    words = shlex.split(role.args[1]) if role.entrypoint == "bash" else role.args
    return words[words.index("torchrec_em3", words.index("-m")) + 1 :]
