"""Files of tensors that others are to use."""

from pathlib import Path

__all__ = ["make_readable"]


def make_readable(path: Path) -> None:
    """Let everyone read a file of safetensors, which are made for their owner alone."""
    path.chmod(0o644)
