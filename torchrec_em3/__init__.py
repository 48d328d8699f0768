"""torchrec-em3: end-to-end training of a multimodal model and a ranking model (EM3) on TorchRec."""

import pathlib

__version__ = "0.1.0"

# The folders components/, datasets/ and torchx_specs/ lie beside this one in a checkout and below it in a wheel. They
# carry no __init__.py on purpose: a checkout's root is on sys.path under `python -m`, `torchrun -m` and pytest, and a
# regular package called "datasets" there would hide Hugging Face's. As plain folders they lose to any real package of
# that name, and this line makes them importable as torchrec_em3.components and so on (tests/test_packaging.py tries
# every launcher).
_here = pathlib.Path(__file__).resolve().parent
if not (_here / "components").is_dir():
    __path__.append(str(_here.parent))
