"""Where the time of a training step goes, by part of the model: real steps of the pipeline under torch.profiler.

A part's forward time is the time inside its calls, without that of other parts called from there. Its backward time is
that of the autograd nodes which its forward operators made: the profiler gives both the same sequence number. So each
moment of a step belongs to exactly one part, and what belongs to no part of the model is a part called "rest".
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce, wraps
from pathlib import Path
from typing import Any, NamedTuple

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from torchrec_em3.batch import Batch
from torchrec_em3.config import Config
from torchrec_em3.datasets.loader import batch_loader
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.evaluate import refresh_bank
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import Ranks
from torchrec_em3.sharding import ShardedModel
from torchrec_em3.streams import open_stream

__all__ = ["OperatorTime", "PartTime", "StepProfile", "profile_steps"]

LOADER, OPTIMIZER, AVERAGE = "loader", "optimizer", "weight average"
GRADIENTS = "gradients of dense weights"
"""Adding them up and, by DistributedDataParallel's hooks, averaging them over the ranks."""
FORWARD_REST, BACKWARD_REST, STEP_REST = "forward, rest", "backward, rest", "step, rest"
MODEL_PARTS = (
    ("distinct items", "_split"),
    ("ID lookup", "users.ask"),
    ("ID lookup", "users.answer"),
    ("ID lookup", "items.ask"),
    ("ID lookup", "items.answer"),
    ("ID attention", "attention.forward"),
    ("token fetch", "content.tokens.forward"),
    ("encoders", "content.tokens.encoders.forward"),
    ("tower", "content.tower.forward"),
    ("tower", "content.projection.forward"),
    ("bank read", "content.bank.read"),
    ("bank write", "content.bank.write"),
    ("history projection", "content.history.forward"),
    ("content attention", "content.attention.forward"),
    ("content similarity", "content.similarity.forward"),
    ("code features", "codes.forward"),
    ("content, rest", "content.forward"),
    ("alignment", "alignment.forward"),
    ("ranker", "ranker.forward"),
    ("loss", "_rank_loss"),
)
"""Parts of the model in the order of the table, each with the method of `EM3Model` that is its forward pass."""
PARTS = (
    *dict.fromkeys((LOADER, *(part for part, _ in MODEL_PARTS))),
    FORWARD_REST,
    GRADIENTS,
    BACKWARD_REST,
    OPTIMIZER,
    AVERAGE,
    STEP_REST,
)

_SPAN = "em3: "
_NODE = "autograd::engine::evaluate_function: "
_ACCUMULATION = "torch::autograd::AccumulateGrad"
_STEP = "ProfilerStep"


class _Place(NamedTuple):
    """What a moment of a step belongs to."""

    part: str
    backward: bool


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part over all profiled steps: of the training thread, and of the device (0 on CPU)."""

    part: str
    forward: float
    backward: float
    device: float

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class OperatorTime:
    """Calls of one operator over all profiled steps, and its seconds without those of operators that it calls."""

    name: str
    calls: int
    seconds: float
    device: float


@dataclass(frozen=True)
class StepProfile:
    """What `profile_steps` found on this rank.

    Attributes:
        steps: Steps profiled.
        samples: Rows of these steps on this rank.
        seconds: Time of these steps, under the profiler.
        cpu_seconds: Processor time of as many steps without the profiler.
        profiled_cpu_seconds: Processor time of the profiled steps.
        parts: Parts that took any time, in the order of `PARTS`; their seconds add up to `seconds`.
        operators: Operators, the heaviest first.
    """

    steps: int
    samples: int
    seconds: float
    cpu_seconds: float
    profiled_cpu_seconds: float
    parts: list[PartTime]
    operators: list[OperatorTime]


def profile_steps(
    config: Config,
    data: PreparedData,
    sharded: ShardedModel,
    ranks: Ranks,
    *,
    steps: int,
    warm_up: int,
    trace: Path | None = None,
) -> StepProfile:
    """Train some steps as `em3 train` does and say where their time went; nothing is saved but the trace. Collective.

    The content bank is refreshed first, as after a validation: otherwise every target would still have to be encoded.

    Args:
        config: The run's options.
        data: Prepared folder.
        sharded: The model, which trains on.
        ranks: This process among its peers.
        steps: Steps to profile, >= 1; as many are timed before without the profiler.
        warm_up: Steps before those.
        trace: File for the Chrome trace, compressed if its name ends in .gz; None writes none.
    """
    refresh_bank(sharded, ranks)
    pipeline = CheckedPipeline(sharded, ranks)
    batches = _batches(config, data, ranks)
    _train(pipeline, batches, warm_up)
    cpu_seconds = _train(pipeline, batches, steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    # The first step under the profiler carries its start-up cost and is thrown away.
    window = schedule(wait=0, warmup=1, active=steps, repeat=1)
    profiled = []
    with _spans(sharded, pipeline), profile(activities=activities, schedule=window) as profiler:
        for _ in range(steps + 1):
            profiled.append(_train(pipeline, batches, 1))
            profiler.step()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    tally = _Tally(profiler.events() or [])
    return StepProfile(
        steps=steps,
        samples=steps * config.loader.batch_size,
        seconds=tally.seconds,
        cpu_seconds=cpu_seconds,
        profiled_cpu_seconds=sum(profiled[1:]),
        parts=tally.parts(),
        operators=tally.operators(),
    )


def _train(pipeline: CheckedPipeline, batches: Iterator[Batch], steps: int) -> float:
    """Train some steps as `Trainer` does and return their CPU seconds."""
    started = time.process_time()
    for _ in range(steps):
        pipeline.progress(batches)
    return time.process_time() - started


def _batches(config: Config, data: PreparedData, ranks: Ranks) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other, each loaded inside the loader's span."""
    stream = open_stream(config, data, "train", ranks)
    for epoch in itertools.count():
        stream.seek(epoch)
        batches = iter(batch_loader(stream, config.loader.num_workers))
        while True:
            with record_function(_SPAN + LOADER):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch


@contextmanager
def _spans(sharded: ShardedModel, pipeline: CheckedPipeline) -> Iterator[None]:
    """While active, each part's calls are spans of the profiler; the model's own code knows nothing of it."""
    outer = [
        (FORWARD_REST, sharded.module, "forward"),
        (BACKWARD_REST, pipeline, "_backward"),
        (OPTIMIZER, sharded.optimizer, "zero_grad"),
        (OPTIMIZER, sharded.optimizer, "step"),
        (AVERAGE, sharded.average, "update"),
    ]
    with ExitStack() as stack:
        for part, owner, method in itertools.chain(outer, _model_methods(sharded.model)):
            call = getattr(owner, method)
            undo = (setattr, owner, method, call) if method in vars(owner) else (delattr, owner, method)
            setattr(owner, method, _in_span(part, call))
            stack.callback(*undo)
        yield


def _model_methods(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield part, owner and method for each part that this model has."""
    for part, path in MODEL_PARTS:
        *owners, method = path.split(".")
        # What a model does not have is None in it: the content path, its bank, the alignment.
        owner = reduce(lambda found, name: None if found is None else getattr(found, name), owners, model)
        if owner is not None:
            compiled = method == "forward" and owner._compiled_call_impl is not None
            yield part, owner, "_compiled_call_impl" if compiled else method


def _in_span(part: str, call: Any) -> Any:
    @wraps(call)
    def spanned(*arguments: Any, **options: Any) -> Any:
        with record_function(_SPAN + part):
            return call(*arguments, **options)

    return spanned


class _Tally:
    """Sums of the events' own times, those of the events inside them left out."""

    def __init__(self, events: Iterable[FunctionEvent]) -> None:
        roots = [event for event in events if event.device_type.name == "CPU" and event.cpu_parent is None]
        self._host: Counter[_Place] = Counter()
        self._device: Counter[str] = Counter()
        self._operators: dict[str, OperatorTime] = {}
        self._makers: dict[tuple[int | None, int], str] = {}
        self.seconds = 0.0
        for event in roots:
            if event.name.startswith(_STEP):
                self.seconds += event.cpu_time_total / 1e6
                self._add(event, _Place(STEP_REST, False))
        # On CUDA the nodes run in a thread of autograd's while the training thread waits for them.
        for event in roots:
            if event.name.startswith(_NODE):
                self._host[_Place(BACKWARD_REST, False)] -= event.cpu_time_total / 1e6
                self._add(event, _Place(BACKWARD_REST, True))

    def _add(self, root: FunctionEvent, place: _Place) -> None:
        """Add the events of a tree in the order in which they began."""
        waiting = [(root, place)]
        while waiting:
            event, outer = waiting.pop()
            place = self._place(event, outer)
            if not place.backward and event.sequence_nr >= 0:
                # An operator without a node of its own bears the number of the next node; the last one is its maker.
                self._makers[event.thread, event.sequence_nr] = place.part
            own, device = event.self_cpu_time_total / 1e6, event.self_device_time_total / 1e6
            self._host[place] += own
            self._device[place.part] += device
            if not event.is_user_annotation and not event.name.startswith(_NODE):
                before = self._operators.get(event.name, OperatorTime(event.name, 0, 0.0, 0.0))
                self._operators[event.name] = OperatorTime(
                    event.name, before.calls + 1, before.seconds + own, before.device + device
                )
            waiting += [(child, place) for child in reversed(event.cpu_children)]

    def _place(self, event: FunctionEvent, outer: _Place) -> _Place:
        if event.name.startswith(_SPAN):
            return _Place(event.name.removeprefix(_SPAN), False)
        if event.name.startswith(_NODE):
            if event.name.endswith(_ACCUMULATION):
                return _Place(GRADIENTS, True)
            return _Place(self._makers.get((event.fwd_thread, event.sequence_nr), BACKWARD_REST), True)
        return outer

    def parts(self) -> list[PartTime]:
        """Return the parts that took any time, in the order of `PARTS`."""
        found = [
            PartTime(part, self._host[_Place(part, False)], self._host[_Place(part, True)], self._device[part])
            for part in PARTS
        ]
        return [part for part in found if part.forward or part.backward or part.device]

    def operators(self) -> list[OperatorTime]:
        """Return the operators, the heaviest first."""
        return sorted(self._operators.values(), key=lambda operator: (-operator.device, -operator.seconds))
