import ast
import json
import shlex
from pathlib import Path

import pytest
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.specs import AppDef

from torchrec_em3.torchx_specs import train

FILE = Path(train.__file__)
TRAINING = ["--config", "configs/movielens.yaml", "--data", "my data", "--run", "runs/a"]
FORWARDED = ["--run_folder" if word == "--run" else word for word in TRAINING]


class TrainSpecTest(ComponentTestCase):
    def test_components_are_valid(self) -> None:
        self.validate(train, "ddp")
        self.validate(train, "evaluate")


def component(name: str, arguments: list[str], scheduler: str = "local_cwd") -> tuple[AppDef, str]:
    """Parse command-line arguments as `torchx run` does; return the application and the scheduler's request."""
    with get_runner("test") as runner:
        info = runner.dryrun_component(f"{FILE}:{name}", arguments, scheduler, cfg={})
        assert info._app is not None
        return info._app, str(info)


def worker_arguments(app: AppDef) -> list[str]:
    """Return what follows `torchrun ... -m torchrec_em3`."""
    words = shlex.split(app.roles[0].args[1])
    assert words[0] == "torchrun"
    return words[words.index("torchrec_em3", words.index("-m")) + 1 :]


def option(app: AppDef, name: str) -> str:
    words = shlex.split(app.roles[0].args[1])
    return words[words.index(name) + 1]


def test_arguments_are_forwarded_exactly():
    extra = ["--model.content", "none", "--model.content_options.note", "a b; $HOME 'q'"]
    app, _ = component("ddp", ["-j", "1x2", *TRAINING, "--seed", "3", "--", *extra])
    assert worker_arguments(app) == ["train", *FORWARDED, "--seed", "3", *extra]
    assert option(app, "--nproc_per_node") == "2"
    assert option(app, "--nnodes") == "1"


def test_defaults_leave_the_preset_in_charge():
    app, _ = component("ddp", TRAINING)
    assert worker_arguments(app) == ["train", *FORWARDED]
    assert app.roles[0].env["OMP_NUM_THREADS"] == "1"
    assert "PET_MAX_RESTARTS" not in app.roles[0].env
    assert app.roles[0].max_retries == 0


def test_retries_set_both_restart_variables():
    app, _ = component("ddp", [*TRAINING, "--max_retries", "4", "--threads", "2"])
    role = app.roles[0]
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role.env["PET_MAX_RESTARTS"] == "4"
    assert role.env["OMP_NUM_THREADS"] == "2"
    assert role.max_retries == 4
    assert worker_arguments(app) == ["train", *FORWARDED]


def test_resume_is_a_flag():
    assert worker_arguments(component("ddp", [*TRAINING, "--resume", "true"])[0]) == ["train", *FORWARDED, "--resume"]
    assert worker_arguments(component("ddp", [*TRAINING, "--resume", "false"])[0]) == ["train", *FORWARDED]


@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm"])
def test_dry_run(scheduler):
    resources = ["--cpu", "7", "--memMB", "5000", "--gpu", "2", "--max_retries", "1"]
    app, request = component("ddp", ["-j", "2x2", *TRAINING, *resources], scheduler)
    assert app.roles[0].num_replicas == 2
    resource = app.roles[0].resource
    assert (resource.cpu, resource.memMB, resource.gpu) == (7, 5000, 2)
    for word in ("torchrec_em3", "configs/movielens.yaml", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "PET_MAX_RESTARTS"):
        assert word in request
    if scheduler == "slurm":
        assert "--cpus-per-task=7" in request
        assert "--mem=5000" in request


def test_evaluate_forwards_the_run_folder():
    app, _ = component("evaluate", ["--run", "runs/a", "-j", "1x2", "--", "--split", "test"])
    assert worker_arguments(app) == ["evaluate", "runs/a", "--split", "test"]
    assert app.roles[0].env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert json.loads(json.dumps(app.roles[0].env))["OMP_NUM_THREADS"] == "1"


def test_required_arguments_are_asked_for():
    with pytest.raises(SystemExit):
        component("ddp", ["--config", "a.yaml", "--data", "d"])


def test_the_file_imports_torchx_alone():
    tree = ast.parse(FILE.read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported} == {"torchx", "typing"}
