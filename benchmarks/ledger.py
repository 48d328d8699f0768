"""results.jsonl: one line a finished run, appended and never changed."""

import hashlib
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

__all__ = ["Ledger", "commit_of", "hash_of"]

ROOT = Path(__file__).parents[1]
WHAT_TRAINS = ("torchrec_em3", "components", "datasets", "configs")
"""What a run's figures depend on, besides the options that stand in its line."""


class Ledger:
    """The file of finished runs."""

    def __init__(self, path: Path) -> None:
        """Open `path`; a line that a kill cut short is left out."""
        self._path = path
        self._lock = threading.Lock()
        self._done = {record["key"] for record in self.read()}

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines."""
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def __contains__(self, key: str) -> bool:
        """Return whether the run of that key is finished."""
        return key in self._done

    def add(self, record: dict[str, Any]) -> None:
        """Append the line of one run."""
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            whole = not self._path.is_file() or self._path.read_bytes()[-1:] in (b"\n", b"")
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("" if whole else "\n") + json.dumps(record) + "\n")
            self._done.add(record["key"])


def hash_of(value: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def commit_of(root: Path = ROOT) -> str:
    """Return the last commit that changed what trains, so that more rows, and documents, leave a matrix what it is.

    Raises:
        SystemExit: If tracked files differ from the commit that is checked out.
    """
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    if changed:
        raise SystemExit(f"{len(changed.splitlines())} tracked files differ from the commit; commit them first")
    return _git(root, "log", "-1", "--format=%H", "HEAD", "--", *WHAT_TRAINS)[:12]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()
