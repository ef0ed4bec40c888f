"""python -m prep"""

from prep.cli import main
from shared.stop import run_cli

run_cli(main, "python -m prep")
