from pathlib import Path

import pytest

from tests.train.command import Command
from tests.train.export.exported import Exports, trained


@pytest.fixture(scope="session")
def bitnet_run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(train, data, tmp_path_factory.mktemp("runs") / "small", "bitnet")


@pytest.fixture(scope="session")
def twin_run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(train, data, tmp_path_factory.mktemp("runs") / "twin", "none")


@pytest.fixture(scope="session")
def exports(bitnet_run: Path, twin_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"), bitnet_run, twin_run)
