"""What training and scoring cost, in ratios with a goal each, as a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/speed.py [--only 1 7] [--data DATA] [--out FILE]

Rows: 1 EM3 beside ID-only, for each length of history; 2 a million users beside a tenth of them; 3 full histories
beside half-filled ones; 4 the loader's share; 5 memory; 6 the loader alone; 7 scoring and evaluation beside training;
8 EM3 beside MMCTR-Bench's published figure; 9 distinct items beside items as they come.

What is compared takes turns, A B A B, in one process; a row's value is the median of the rounds' ratios. All times are
CPU seconds of the process, so that other work on the machine adds little. Items are Zipf(1.1); tokens have the shapes
of the default encoders. EM3 is history `cache`; its bank is filled first, as after an epoch.
"""

import dataclasses
import itertools
import multiprocessing
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from bench import FULL, HALF, HEADER, Bench, Row, Sizes, costs
from jsonargparse import ArgumentParser
from torch import Tensor
from turns import WARM_UP_STEPS, Training, endless_batches, shape_of, take_turns
from whole_em3 import WHOLE_EM3

from torchrec_em3.batch import Batch
from torchrec_em3.build import open_data
from torchrec_em3.config import Config, LoaderConfig, ModelConfig
from torchrec_em3.evaluate import evaluate_split, predict, refresh_bank
from torchrec_em3.process_group import process_group

EVENTS_OF_A_USER = 10
"""In the comparison of numbers of users, where histories are short and a row's user weighs most."""
MEMORY_STEPS = 20
LOADER_BATCHES = 50
MMCTR_EM3 = 25.4
"""CPU s per 1,000 samples of MMCTR-Bench's EM3 at its catalogue's widths, batch and history as below: measured in
another run on this kind of machine (2 cores, torch 2.13.0), one thread."""
MMCTR_BATCH, MMCTR_HISTORY = 1024, 50
MMCTR_HIDDEN = (1024, 512, 256)
"""Hidden widths both of its content attention and of its head; it has no attention over IDs."""


def content_cost(bench: Bench) -> Iterator[Row]:
    """Row 1: EM3 beside ID-only."""
    limits = {1000: 1.4}
    cases = [("synthetic", bench.filled(history, FULL), history) for history in bench.sizes.histories]
    if bench.sizes.data:
        cases.append((Path(bench.sizes.data).name, Path(bench.sizes.data), bench.sizes.histories[0]))
    for name, path, history in cases:
        configs = bench.models(path, history)
        times = bench.train(configs)
        shape = shape_of(configs["EM3"], open_data(configs["EM3"]))
        measured = f"{name}: {shape}; {costs(times)}"
        what = f"training EM3 / ID-only, history {history}"
        yield Row(1, what, f"<= {limits.get(history, 1.3)}", times["EM3"] / times["ID-only"], measured)


def user_scale(bench: Bench) -> Iterator[Row]:
    """Row 2: ten times as many users, as many events a user."""
    configs = {}
    for users in (bench.sizes.num_users // 10, bench.sizes.num_users):
        path = bench.synthetic(users, users * EVENTS_OF_A_USER)
        configs[f"{users:,} users"] = bench.models(path, bench.sizes.histories[0])["ID-only"]
    few, many = configs
    times = bench.train(configs)
    shape = shape_of(configs[many], open_data(configs[many]))
    yield Row(2, f"training ID-only, {many} / {few}", "<= 1.15", times[many] / times[few], f"{shape}; {costs(times)}")


def raggedness(bench: Bench) -> Iterator[Row]:
    """Row 3: histories of all lengths up to the limit beside full ones."""
    for history, model in itertools.product(bench.sizes.histories, ("ID-only", "EM3")):
        fills = {"full": FULL, "half-filled": HALF}
        configs = {name: bench.models(bench.filled(history, fill), history)[model] for name, fill in fills.items()}
        times = bench.train(configs)
        lengths = [shape_of(config, open_data(config)).history for config in configs.values()]
        measured = f"{lengths[0]:.1f} and {lengths[1]:.1f} history items a row; {costs(times)}"
        what = f"speed of {model}, half-filled / full histories of {history}"
        yield Row(3, what, ">= 1.6", times["full"] / times["half-filled"], measured)


def loader_share(bench: Bench) -> Iterator[Row]:
    """Row 4: the pipeline with the loader beside bare steps on batches that are there already."""
    for (source, path), model in itertools.product(bench.sources(), ("ID-only", "EM3")):
        training = Training(bench.models(path, bench.sizes.histories[0])[model], bench.ranks)
        ready = list(itertools.islice(endless_batches(training.config, training.data), bench.sizes.steps))
        works = {
            "with loader": partial(training.run, bench.sizes.steps),
            "bare": partial(_bare_steps, training, ready, bench.ranks.device),
        }
        training.run(WARM_UP_STEPS)
        times = take_turns(works, bench.sizes.rounds)
        what = f"samples/s of {model}, with our loader / bare step"
        yield Row(4, what, ">= 0.9", times["bare"] / times["with loader"], f"{source}: {costs(times)}")


def _bare_steps(training: Training, ready: list[Batch], device: torch.device) -> int:
    sharded = training.sharded
    for batch in ready:
        sharded.optimizer.zero_grad()
        loss, _ = sharded.module(batch.to(device))
        loss.backward()
        sharded.optimizer.step()
        sharded.average.update(sharded.model.step)
    return sum(len(batch) for batch in ready)


def memory(bench: Bench) -> Iterator[Row]:
    """Row 5: peak resident memory of a process that trains, with and without mapped files."""
    for source, path in bench.sources():
        used = {}
        for name, config in bench.models(path, bench.sizes.histories[0]).items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                used[name] = pool.submit(_train_and_look, config).result()
        words = "; ".join(f"{name} {_in_words(found)}" for name, found in used.items())
        for what, field in (("peak memory", "VmHWM"), ("private memory", "RssAnon")):
            ratio = np.array([used["EM3"][field] / used["ID-only"][field]])
            yield Row(5, f"{what} EM3 / ID-only", "<= 1.25", ratio, f"{source}, {MEMORY_STEPS} steps: {words}")


def _train_and_look(config: Config) -> dict[str, float]:
    """Train some steps from the first on, bank empty, and return what Linux says of this process, in MiB.

    Private memory at the end is its peak too, since what was freed is kept. The rest of VmHWM is pages of mapped files,
    those of the token store above all.
    """
    with process_group() as ranks:
        training = Training(config, ranks, refresh=False)
        training.run(MEMORY_STEPS)
        # Not getrusage: its peak starts from that of the process which started this one.
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def _in_words(found: Mapping[str, float]) -> str:
    return f"{found['VmHWM']:,.0f} MiB (at the end {found['RssAnon']:,.0f} private, {found['RssFile']:,.0f} of files)"


def _read(batches: Iterator[Batch], count: int) -> int:
    """Take batches; return their rows."""
    return sum(len(batch) for batch in itertools.islice(batches, count))


def loader_alone(bench: Bench) -> Iterator[Row]:
    """Row 6: how much faster the loader is than what it feeds."""
    for source, path in bench.sources():
        training = Training(bench.models(path, bench.sizes.histories[0])["ID-only"], bench.ranks)
        batches = endless_batches(training.config, training.data)
        works: dict[str, Callable[[], int]] = {
            "loader": partial(_read, batches, LOADER_BATCHES),
            "training ID-only": partial(training.run, bench.sizes.steps),
        }
        training.run(WARM_UP_STEPS)
        times = take_turns(works, bench.sizes.rounds)
        ratio = times["training ID-only"] / times["loader"]
        rate = 1000 / np.median(times["loader"])
        measured = f"{source}: loader {rate:,.0f} samples/s; {costs(times)}"
        yield Row(6, "samples/s of the loader alone / training ID-only", ">= 5", ratio, measured)


def scoring(bench: Bench) -> Iterator[Row]:
    """Row 7: `predict`, and `evaluate_split` without its refresh of the bank, on the validation split."""
    for (source, path), model in itertools.product(bench.sources(), ("ID-only", "EM3")):
        training = Training(bench.models(path, bench.sizes.histories[0])[model], bench.ranks)
        times = _scoring_times(training, bench)
        refresh = times.pop("refresh")
        times["evaluation"] -= refresh  # `evaluate_split` begins with one
        rows = len(training.data.split_rows("validation")["user"])
        words = f"{source}, {rows:,} rows: {costs(times)}"
        if model == "EM3":
            seconds = np.median(refresh) * rows / 1000
            words += f"; a refresh of {training.data.item_rows - 1:,} items takes {seconds:.2f} CPU s"
        for name in ("scoring", "evaluation"):
            what = f"samples/s of {name} / training, {model}"
            yield Row(7, what, ">= 3", times["training"] / times[name], words)


def _scoring_times(training: Training, bench: Bench) -> dict[str, np.ndarray]:
    sharded, data, config = training.sharded, training.data, training.config
    rows = len(data.split_rows("validation")["user"])

    def counted(work: Callable[[], object]) -> Callable[[], int]:
        def run() -> int:
            work()
            return rows

        return run

    training.run(WARM_UP_STEPS)
    return take_turns(
        {
            "training": partial(training.run, bench.sizes.steps),
            "refresh": counted(lambda: refresh_bank(sharded, bench.ranks)),
            "scoring": counted(lambda: predict(sharded, data, "validation", config, bench.ranks)),
            "evaluation": counted(lambda: evaluate_split(sharded, data, "validation", config, bench.ranks)),
        },
        bench.sizes.rounds,
    )


def mmctr_em3(bench: Bench) -> Iterator[Row]:
    """Row 8: EM3 beside a published figure, which took no turns with it."""
    whole = ModelConfig(**WHOLE_EM3)
    head = dataclasses.replace(whole, content_attention_hidden=MMCTR_HIDDEN, ranker_options={"hidden": MMCTR_HIDDEN})
    models = {
        "with each project's own widths": (whole, 60),
        "with its widths of content attention and head": (head, 20),
        "with its width of attention over IDs too": (dataclasses.replace(head, attention_hidden=MMCTR_HIDDEN), 20),
    }
    loader = LoaderConfig(batch_size=MMCTR_BATCH, max_history=MMCTR_HISTORY)
    data = str(bench.filled(MMCTR_HISTORY, FULL))
    configs = {name: Config(data=data, loader=loader, model=model) for name, (model, _) in models.items()}
    times = bench.train(configs)
    for name, (_, factor) in models.items():
        shape = shape_of(configs[name], open_data(configs[name]))
        measured = (
            f"synthetic: {shape}; ours {np.median(times[name]):.3f} CPU s per 1,000 samples, MMCTR-Bench's {MMCTR_EM3} "
            "measured elsewhere: another run, same kind of machine"
        )
        what = f"speed of EM3 / MMCTR-Bench's EM3, {name}"
        yield Row(8, what, f">= {factor}", MMCTR_EM3 / times[name], measured)


def deduplication(bench: Bench) -> Iterator[Row]:
    """Row 9: a step of EM3 that encodes all its targets and aligns none, on distinct items and on all as they come."""
    history = bench.sizes.histories[0]
    em3 = bench.models(bench.filled(history, FULL), history)["EM3"]
    config = dataclasses.replace(em3, model=dataclasses.replace(em3.model, encode_fraction=1.0, alignment_weight=0.0))
    trainings = {name: Training(config, bench.ranks) for name in ("distinct", "as they come")}

    def as_they_come() -> int:
        with mock.patch("torchrec_em3.model.distinct", _as_they_come):
            return trainings["as they come"].run(bench.sizes.steps)

    works = {"distinct": partial(trainings["distinct"].run, bench.sizes.steps), "as they come": as_they_come}
    take_turns(works, 1)  # warms up
    times = take_turns(works, bench.sizes.rounds)
    shape = shape_of(config, trainings["distinct"].data)
    share = shape.rows / shape.distinct_targets, shape.rows * shape.history / shape.distinct_history
    measured = f"synthetic: {shape}, so {share[0]:.1f} and {share[1]:.1f} of each; {costs(times)}"
    what = "speed of EM3, each distinct item once / items as they come"
    yield Row(9, what, ">= 1", times["as they come"] / times["distinct"], measured)


def _as_they_come(id_N: Tensor, table_rows: int) -> tuple[Tensor, Tensor]:
    """Stand in for `distinct`: every id counts as one of its own."""
    return id_N, torch.arange(id_N.numel(), device=id_N.device)


ROWS: dict[int, Callable[[Bench], Iterator[Row]]] = {
    1: content_cost,
    2: user_scale,
    3: raggedness,
    4: loader_share,
    5: memory,
    6: loader_alone,
    7: scoring,
    8: mmctr_em3,
    9: deduplication,
}


def main() -> None:
    """Print the table, and write it if asked to."""
    parser = ArgumentParser(description="What training and scoring cost, in ratios with a goal each.")
    parser.add_argument("--only", type=int, nargs="+", default=list(ROWS), help="Numbers of the rows to measure.")
    parser.add_argument("--out", type=str, default="", help="Markdown file to write as well.")
    parser.add_class_arguments(Sizes)
    values = parser.parse_args()
    sizes = Sizes(**{field.name: values[field.name] for field in dataclasses.fields(Sizes)})
    command = shlex.join(["python", *sys.argv])
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        lines = [f"# Speed\n\n```\n{command}\n```\n\n{sizes}\n", HEADER]
        print("\n".join(lines), flush=True)
        for number in values.only:
            for row in ROWS[number](Bench(sizes, Path(folder), ranks)):
                lines.append(str(row))
                print(row, flush=True)
    if values.out:
        Path(values.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
