from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.train.command import Command
from tests.train.dataset import build


@pytest.fixture(scope="session")
def train() -> Iterator[Command]:
    command = Command()
    yield command
    command.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 train and 10 val sequences of 32 tokens: enough for the 24 steps of command.TINY."""
    return build(tmp_path_factory.mktemp("data") / "set", train=120, val=10)


@pytest.fixture(autouse=True)
def _arithmetic_of_its_own() -> Iterator[None]:
    """What runtime.prepare sets for a test in this process is not left to the next one."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
