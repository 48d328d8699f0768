"""The loader alone: rows per second, beside the rows per second of training on one thread.

python benchmarks/loader.py --data DATA
"""

import itertools
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli
from synthetic import write_synthetic
from turns import endless_batches

from torchrec_em3.config import Config, LoaderConfig
from torchrec_em3.datasets.prepared import PreparedData


def main(data: str = "", batch_size: int = 4096, max_history: int = 50, steps: int = 200) -> None:
    """Print rows per second and CPU seconds per 1,000 rows.

    Args:
        data: Prepared folder; synthetic data if empty.
        batch_size: Rows per step.
        max_history: Longest history.
        steps: Batches to read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = (
            Path(data)
            if data
            else write_synthetic(Path(folder) / "data", num_users=5_000, num_items=50_000, num_events=1_500_000)
        )
        config = Config(loader=LoaderConfig(batch_size=batch_size, max_history=max_history))
        batches = endless_batches(config, PreparedData.open(path))
        wall, cpu = time.perf_counter(), time.process_time()
        rows = sum(len(batch) for batch in itertools.islice(batches, steps))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{rows} rows: {rows / wall:,.0f} rows/s, {cpu / rows * 1000:.5f} CPU s per 1,000 rows")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
