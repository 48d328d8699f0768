"""A virtual environment for each peer, made when it is first asked for: their pins exclude each other and ours."""

import subprocess
import sys
from pathlib import Path

__all__ = ["python_of"]

TORCH = "torch==2.13.0"
"""First, and named again beside the rest, so that no peer replaces it."""
REQUIREMENTS = Path(__file__).parent / "requirements"


def python_of(peer: str, envs: Path) -> Path:
    """Return the interpreter of a peer's environment, which is made and filled if it is not there yet.

    Args:
        peer: Name of a file in `requirements`, without .txt.
        envs: Folder of the environments.

    Raises:
        CalledProcessError: If an installation fails; pip has said why.
    """
    requirements = REQUIREMENTS / f"{peer}.txt"
    folder = (envs / peer).absolute()
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"{TORCH}\n{requirements.read_text(encoding='utf-8')}"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {peer} into {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TORCH]
    subprocess.run(install, check=True, stdout=sys.stderr)
    subprocess.run([*install, "--requirement", requirements], check=True, stdout=sys.stderr)
    stamp.write_text(wanted, encoding="utf-8")
    return python
