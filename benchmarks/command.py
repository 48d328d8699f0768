"""Commands of `em3` as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from ledger import ROOT

__all__ = ["run_em3"]


def run_em3(log: Path, *arguments: str) -> None:
    """Run a command on one thread; what it prints goes into `log`.

    Raises:
        SystemExit: If it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", "torchrec_em3", *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            check=False,
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise SystemExit(f"em3 {' '.join(arguments)} ended with {done.returncode}: {' '.join(last)} (see {log})")
