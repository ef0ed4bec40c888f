"""`python -m train` with faults (server.FAULTS) on one rank, until torchrun restarts it.

python -m tests.train.faulty RANK FAULTS ARGS...
"""

import json
import os
import sys

from shared.stop import run_cli
from tests.train.server import FAULTS
from train.cli import main

if __name__ == "__main__":
    rank, faults, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        for name, *values in json.loads(faults):
            FAULTS[name](*values)
    sys.argv[1:] = arguments
    run_cli(main, "python -m train")
