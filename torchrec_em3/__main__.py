"""`python -m torchrec_em3` and `torchrun -m torchrec_em3` are the command `em3`."""

from torchrec_em3.cli import main

main()
