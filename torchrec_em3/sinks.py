"""Where a run's numbers are shown while it goes: TensorBoard, Weights & Biases, MLflow.

The last two are optional packages, each with its own settings: WANDB_MODE, WANDB_PROJECT and the like,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from torchrec_em3.config import Config
from torchrec_em3.errors import ConfigError
from torchrec_em3.run_record import flatten

__all__ = ["MlflowSink", "Sink", "TensorBoardSink", "WandbSink", "check_sinks", "open_sinks"]

PROJECT = "torchrec-em3"
"""Project of W&B and experiment of MLflow, where the environment names none."""
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What to install for a sink whose package is not always there."""


class Sink(Protocol):
    """Takes the scalars of a run, on its first rank."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers of one step, by name; a resumed run may record a step again, with the same numbers."""
        ...

    def close(self) -> None:
        """Write what is still held, and mark the run as done."""
        ...


class TensorBoardSink:
    """Event files in `RUN/tensorboard`."""

    def __init__(self, run: Path, config: Config) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases under an id that the run folder keeps; a step recorded again is ignored there."""

    def __init__(self, run: Path, config: Config) -> None:
        wandb = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            id=_run_id(run, "wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            name=run.name,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run),
            config=config.as_dict(),
            reinit="create_new",
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow, whose id the run folder keeps."""

    def __init__(self, run: Path, config: Config) -> None:
        self._client: Any = importlib.import_module("mlflow").MlflowClient()
        self._id = _run_id(run, "mlflow", lambda: self._create(run.name, config))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, name: str, config: Config) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        run_id: str = self._client.create_run(experiment_id, run_name=name).info.run_id
        for key, value in flatten(config.as_dict()).items():
            self._client.log_param(run_id, key, str(value))
        return run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._client.set_terminated(self._id)


def _run_id(run: Path, sink: str, create: Callable[[], str]) -> str:
    """Return the id that this run has had with a sink since its start, or a new one."""
    path = run / f"{sink}.json"
    if not path.is_file():
        path.write_text(json.dumps({"run_id": create()}) + "\n", encoding="utf-8")
    return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])


_SINKS: dict[str, Callable[[Path, Config], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def check_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a sink is not installed; on every rank, so that none waits for the first."""
    for name in names:
        found = importlib.util.find_spec(name) if name in PACKAGES else None
        # The folder `wandb` of earlier runs in the working directory looks like a package without an origin.
        if name in PACKAGES and (found is None or found.origin is None):
            raise ConfigError(
                f"--train.sinks names {name}, whose package is not installed; `pip install {PACKAGES[name]}` or leave "
                f"{name} out"
            )


def open_sinks(run: Path, config: Config) -> list[Sink]:
    """Open the sinks that the config names; to be called on the first rank, after `check_sinks` on all."""
    return [_SINKS[name](run, config) for name in config.train.sinks]
