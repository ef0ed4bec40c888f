from shared.stop import run_cli
from train.cli import main

run_cli(main, "python -m train")
