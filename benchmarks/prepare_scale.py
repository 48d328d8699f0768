"""How much memory and time `em3 prepare simulated` takes for many events.

    OMP_NUM_THREADS=1 python benchmarks/prepare_scale.py [--num_events 50000000] [--num_users 200000] [--num_items 500]

Runs the command as a process of its own, without encoders, and prints its events, the largest resident memory that it
had, and its time. The folder that it writes is opened, read whole and compared with its hash, then removed.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli

from torchrec_em3.datasets.prepared import PreparedData


def main(num_events: int = 50_000_000, num_users: int = 200_000, num_items: int = 500, folder: str = "") -> None:
    """Print two lines: what was prepared, and what it took.

    Args:
        num_events: Events, about: a user who has seen everything is shown nothing.
        num_users: Users.
        num_items: Items of the catalogue.
        folder: Where the temporary folder is made; the system's if not given.
    """
    sizes = {"num_interactions": num_events, "num_users": num_users, "num_items": num_items, "image_size": 32}
    with tempfile.TemporaryDirectory(dir=folder or None) as temporary:
        data = Path(temporary) / "data"
        command = [sys.executable, "-m", "torchrec_em3", "prepare", "simulated", "--out", str(data)]
        command += ["--text_encoder", "none", "--image_encoder", "none"]
        command += [f"--catalogue.{name}={size}" for name, size in sizes.items()]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        prepared = PreparedData.open(data)
        prepared.verify()
        events = prepared.meta["counts"]["interactions"]
        written = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    print(f"{events:,} events, {written / 2**30:.2f} GiB written and verified")
    print(
        f"peak {used.ru_maxrss / 2**20:.2f} GiB resident; {seconds:,.0f} s, "
        f"{used.ru_utime + used.ru_stime:,.0f} s of them on a processor"
    )


if __name__ == "__main__":
    auto_cli(main)
