"""One rank of a training that benchmarks/scale.py measures; rank 0 prints a line of JSON.

python benchmarks/scale_worker.py CONFIG.yaml STEPS
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from turns import WARM_UP_STEPS, Training

from torchrec_em3.config import Config
from torchrec_em3.parsing import read_config
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.run_folder import peak_rss_bytes


def measure(config: Config, steps: int, ranks: Ranks) -> dict[str, Any] | None:
    """Train, and return what it took over all ranks; None on all ranks but the first."""
    training = Training(config, ranks)
    training.run(WARM_UP_STEPS)
    ranks.barrier()
    wall, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    samples = training.run(steps)
    spent = (time.perf_counter() - wall, time.process_time() - cpu, time.thread_time() - thread)
    peak = peak_rss_bytes(ranks)
    gathered = ranks.gather(spent)
    if gathered is None:
        return None
    wall_seconds, cpu_seconds, thread_seconds = np.array(gathered).T
    return {
        "steps": steps,
        "samples": samples * ranks.world_size,
        "wall_seconds": float(wall_seconds.max()),
        "thread_seconds": float(thread_seconds.mean()),
        "cpu_seconds_per_1k": float(cpu_seconds.sum() / (samples * ranks.world_size) * 1000),
        "peak_rss_bytes": peak,
    }


if __name__ == "__main__":
    with process_group() as ranks:
        found = measure(read_config(Path(sys.argv[1])), int(sys.argv[2]), ranks)
    if found is not None:
        print(json.dumps(found))
