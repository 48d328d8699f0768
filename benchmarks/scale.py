"""What size costs: plans of tables up to 10^10 rows, tables that train here, long histories, the loader, two processes.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--only '[plans, history]'] [--out benchmarks/results/scale.md]

Each part is a Markdown table. Those that train start processes of their own, on one thread each, with synthetic data:
Zipf(1.1) items, random tokens of the shapes of the default encoders. Times are of the machine as it is; run it alone.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from synthetic import write_synthetic
from whole_em3 import WHOLE_EM3

from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig
from torchrec_em3.parsing import dump_config, resolve_parts
from torchrec_em3.plan_study import DEFAULT_TOKENS, plan_for, planned_schema, summary
from torchrec_em3.plan_text import format_bytes
from torchrec_em3.topology import read_cluster

WORKER = Path(__file__).with_name("scale_worker.py")
PLANNED_ROWS = (10**8, 10**9, 10**10)
CLUSTERS = ("8xH100", "64xH100", "256xH100")
ITEMS_SHARE = 100
"""Users an item in the planned tables."""
HISTORIES = (50, 200, 1000)
TABLE_ROWS = (1_000_000, 10_000_000, 50_000_000)
PROCESSES = (1, 2)
NUM_ITEMS = 50_000


def plans(_: Path) -> list[str]:
    """Plans for clusters that need not exist, by TorchRec's planner on meta tensors."""
    rows = []
    for count in PLANNED_ROWS:
        schema = planned_schema(f"user={count},item={count // ITEMS_SHARE}", DEFAULT_TOKENS)
        for name in CLUSTERS:
            found = summary(plan_for(schema, resolve_parts(Config()), read_cluster(name)))
            lack = f"no, {format_bytes(found['over_bytes'])} of a rank's {found['memory']} too little"
            memory = [format_bytes(found[f"{kind}_bytes"]) if found["fits"] else "" for kind in ("hbm", "ddr")]
            time = f"{found['perf_ms']:.2f}" if found["fits"] else ""
            shardings = ", ".join(found["shardings"]) if found["fits"] else ""
            rows.append([f"{count:.0e}", name, "yes" if found["fits"] else lack, shardings, *memory, time])
    return [
        "## Plans\n",
        f"Users as many as said, an item for {ITEMS_SHARE} of them, default config; memory is that of the fullest rank "
        "with content bank and dense parts, time the planner's estimate for the tables alone.\n",
        *_table(["users", "cluster", "fits", "sharding", "HBM", "host memory", "ms a step"], rows),
    ]


def tables(folder: Path) -> list[str]:
    """Hashed tables of many rows, trained in one process."""
    data = _data(folder, num_users=20_000, num_events=400_000)
    rows = []
    for count in TABLE_ROWS:
        hashed = {"user_table": {"ids": "hashed", "rows": count}}
        config = _config(data, "none", embeddings=EmbeddingConfig(tables=hashed))
        found = _train(config, steps=100)
        rows.append([f"{count:,}", format_bytes(count * 64 * 4), *_cells(found)])
    return [
        "## Tables that train here\n",
        "One process, user table of raw ids hashed into so many rows of width 64, row-wise Adagrad, ID-only.\n",
        *_table(["rows", "weights", "samples/s", "CPU s per 1,000", "peak RSS"], rows),
    ]


def history(folder: Path) -> list[str]:
    """Longer histories, with the bank and without content."""
    rows = []
    for length in HISTORIES:
        data = _full_histories(folder, length)
        costs = {}
        for content in ("none", "fusion_qformer"):
            found = _train(_config(data, content, max_history=length), steps=15)
            costs[content] = found["cpu_seconds_per_1k"]
            name = "EM3" if content != "none" else "ID-only"
            rows.append([str(length), name, *_cells(found)])
        rows[-1].append(f"{costs['fusion_qformer'] - costs['none']:.4f}")
        rows[-2].append("")
    return [
        "## Long histories\n",
        "A history item costs its row of the item table and, with content, its row of the bank; no item of a history "
        "is encoded. So the cost of content, last column, grows with the rows that are read alone.\n",
        *_table(["history", "model", "samples/s", "CPU s per 1,000", "peak RSS", "EM3 minus ID-only"], rows),
    ]


def loader(folder: Path) -> list[str]:
    """The loader without training."""
    rows = []
    for length in HISTORIES:
        data = _full_histories(folder, length)
        command = [sys.executable, str(WORKER.with_name("loader.py")), "--data", str(data), "--batch_size", "2048"]
        printed = _run([*command, "--max_history", str(length)])
        _, _, figures = printed.strip().splitlines()[-1].partition(": ")
        rows.append([str(length), *figures.replace(" rows/s", "").replace(" CPU s per 1,000 rows", "").split(", ")])
    return ["## Loader\n", *_table(["history", "rows/s", "CPU s per 1,000"], rows)]


def weak(folder: Path) -> list[str]:
    """The same rows a process on more processes."""
    data = _data(folder, num_users=20_000, num_events=400_000)
    rows = []
    for content in ("none", "fusion_qformer"):
        for processes in PROCESSES:
            found = _train(_config(data, content), steps=40, processes=processes)
            step = found["wall_seconds"] / found["steps"] * 1000
            computed = found["thread_seconds"] / found["steps"] * 1000
            rows.append(
                [
                    "ID-only" if content == "none" else "EM3",
                    str(processes),
                    f"{found['samples'] / found['wall_seconds']:,.0f}",
                    f"{step:.1f}",
                    f"{computed:.1f}",
                    f"{step - computed:.1f}",
                ]
            )
    return [
        "## Weak scaling\n",
        "2,048 rows a process, gloo. Computing is the processor time of the training thread, mean of the ranks; the "
        "rest of a step is communication and waiting for the other rank.\n",
        *_table(["model", "processes", "samples/s", "ms a step", "computing", "communicating"], rows),
    ]


PARTS: Mapping[str, Callable[[Path], list[str]]] = {
    "plans": plans, "tables": tables, "history": history, "loader": loader, "weak": weak,
}  # fmt: skip


def _config(data: Path, content: str, max_history: int = 50, embeddings: EmbeddingConfig | None = None) -> Config:
    return Config(
        data=str(data),
        loader=LoaderConfig(batch_size=2048, max_history=max_history),
        model=ModelConfig(content=content, **WHOLE_EM3, encode_fraction=0.25 if content != "none" else 1.0),
        embeddings=embeddings or EmbeddingConfig(),
    )


def _data(folder: Path, num_users: int, num_events: int) -> Path:
    """Return the synthetic data of these sizes; made once, with one copy of the tokens."""
    path = folder / f"{num_users}-{num_events}"
    if not path.is_dir():
        others = sorted(folder.iterdir())
        write_synthetic(
            path,
            num_users=num_users,
            num_items=NUM_ITEMS,
            num_events=num_events,
            tokens_of=others[0] if others else None,
        )
    return path


def _full_histories(folder: Path, length: int) -> Path:
    """Return data whose users have ten times the events that a row sees, so that most rows see that many."""
    return _data(folder, num_users=1_500_000 // (10 * length), num_events=1_500_000)


def _train(config: Config, steps: int, processes: int = 1) -> dict[str, Any]:
    """Train some steps in processes of their own; return what the worker measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_config(config))
        file.flush()
        arguments = [str(WORKER), file.name, str(steps)]
        printed = _run([sys.executable, *(launcher if processes > 1 else []), *arguments])
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _cells(found: Mapping[str, Any]) -> list[str]:
    rate = found["samples"] / found["wall_seconds"]
    return [f"{rate:,.0f}", f"{found['cpu_seconds_per_1k']:.4f}", format_bytes(found["peak_rss_bytes"])]


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def main(only: tuple[str, ...] = tuple(PARTS), out: str = "") -> None:
    """Measure and print.

    Args:
        only: Parts to measure, all unless said.
        out: Markdown file to write.
    """
    unknown = set(only) - set(PARTS)
    if unknown:
        raise SystemExit(f"--only names {min(unknown)}; parts: {', '.join(PARTS)}")
    lines = [
        "# What size costs\n",
        f"{os.cpu_count()} cores, no GPU; all on CPU. Printed by\n",
        f"```\npython benchmarks/scale.py {shlex.join(sys.argv[1:])}\n```\n",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in only:
            part = PARTS[name](Path(folder))
            print("\n".join(part), flush=True)
            lines += part
    if out:
        Path(out).write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
