import ast
import shlex
from pathlib import Path

import pytest
from torchx.components.component_test_base import ComponentTestCase
from torchx.specs import AppDef, BindMount, VolumeMount, named_resources

from tests.torchx_specs.components import arguments_of, component
from torchrec_em3.torchx_specs import process, train

TRAINING = ["--config", "configs/movielens.yaml", "--data", "my data", "--run", "runs/a"]
FORWARDED = ["--run_folder" if word == "--run" else word for word in TRAINING]
EVERY = {
    "train": TRAINING,
    "evaluate": ["--run", "runs/a"],
    "embed": ["--run", "runs/a", "--out", "items"],
    "benchmark": TRAINING,
}


class SpecsTest(ComponentTestCase):
    def test_components_are_valid(self) -> None:
        for module in (train, process):
            for name in module.__all__:
                self.validate(module, name)


def option(app: AppDef, name: str) -> str:
    words = shlex.split(app.roles[0].args[1])
    return words[words.index(name) + 1]


def test_arguments_are_forwarded_exactly():
    extra = ["--model.content", "none", "--model.content_options.note", "a b; $HOME 'q'"]
    app, _ = component("train", "train", ["-j", "1x2", *TRAINING, "--seed", "3", "--", *extra])
    assert arguments_of(app) == ["train", *FORWARDED, "--seed", "3", "--restartable", *extra]
    assert option(app, "--nproc_per_node") == "2"
    assert option(app, "--nnodes") == "1"


def test_a_mirror_is_forwarded():
    app, _ = component("train", "train", [*TRAINING, "--mirror", "s3://bucket/run", "--", "--train.epochs", "1"])
    assert arguments_of(app)[-5:] == ["--restartable", "--train.mirror", "s3://bucket/run", "--train.epochs", "1"]


def test_retries_set_both_restart_variables():
    app, _ = component("train", "train", [*TRAINING, "--max_retries", "4", "--threads", "2"])
    role = app.roles[0]
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role.env["PET_MAX_RESTARTS"] == "4"
    assert role.env["OMP_NUM_THREADS"] == "2"
    assert role.max_retries == 4


@pytest.mark.parametrize("name", EVERY)
def test_every_gang_gets_environment_mounts_and_resources(name: str):
    mounts = "type=bind,src=/a,dst=/data,readonly,type=volume,src=claim,dst=/runs"
    arguments = [*EVERY[name], "-j", "2x8", "--env", "A=1,OMP_NUM_THREADS=6", "--mounts", mounts]
    app, _ = component("train", name, [*arguments, "--h", "aws_p4d.24xlarge", "--image", "em3:1"])
    role = app.roles[0]
    assert role.env["A"] == "1"
    assert role.env["OMP_NUM_THREADS"] == "6", "what the caller says comes last"
    assert role.env["PET_MAX_RESTARTS"] == "0"
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role.mounts == [BindMount("/a", "/data", read_only=True), VolumeMount("claim", "/runs")]
    assert role.resource == named_resources["aws_p4d.24xlarge"]
    assert (role.num_replicas, role.image) == (2, "em3:1")


def test_the_other_gangs_forward_their_arguments():
    evaluate, _ = component("train", "evaluate", ["--run", "runs/a", "--", "--split", "test"])
    assert arguments_of(evaluate) == ["evaluate", "runs/a", "--data=", "--split", "test"]
    embed, _ = component("train", "embed", ["--run", "runs/a", "--out", "o", "--data", "d", "--", "--faiss"])
    assert arguments_of(embed) == ["embed", "runs/a", "--out", "o", "--data=d", "--faiss"]
    benchmark, _ = component("train", "benchmark", [*TRAINING, "--steps", "3"])
    assert arguments_of(benchmark) == ["profile", *FORWARDED, "--steps", "3"]


def test_commands_of_one_process_forward_their_arguments():
    prepare, _ = component("process", "prepare", ["--kind", "movielens", "--out", "d", "--", "--source", "ml 1m"])
    assert arguments_of(prepare) == ["prepare", "movielens", "--out", "d", "--source", "ml 1m"]
    plan, _ = component("process", "plan", ["--topology", "8xH100", "--out", "o", "--", "--rows", "user=1e6,item=1e6"])
    assert arguments_of(plan) == ["plan", "--topology", "8xH100", "--out", "o", "--rows", "user=1e6,item=1e6"]
    serve, _ = component("process", "serve", ["--package", "p", "--port", "9000", "--replicas", "3"])
    assert arguments_of(serve) == ["serve", "p", "--host", "127.0.0.1", "--port", "9000"]
    assert serve.roles[0].port_map == {"http": 9000}
    assert serve.roles[0].num_replicas == 3


@pytest.mark.parametrize("missing", ["--config", "--data", "--run"])
def test_required_arguments_are_asked_for(missing: str, capsys: pytest.CaptureFixture[str]):
    place = TRAINING.index(missing)
    with pytest.raises(SystemExit):
        component("train", "train", TRAINING[:place] + TRAINING[place + 2 :])
    assert f"the following arguments are required: {missing}" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "module"), [("train", train), ("process", process)])
def test_help_says_what_every_argument_is(file: str, module: object, capsys: pytest.CaptureFixture[str]):
    for name in module.__all__:  # type: ignore[attr-defined]
        with pytest.raises(SystemExit):
            component(file, name, ["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "container image with torchrec-em3 installed" in text
        assert "mounts, type=bind|volume" in text


@pytest.mark.parametrize("module", [train, process])
def test_the_files_import_torchx_alone(module: object):
    tree = ast.parse(Path(str(module.__file__)).read_text())  # type: ignore[attr-defined]
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported} == {"torchx", "typing"}
