import shutil
from pathlib import Path

import pytest

from tests.prep.builds import SOURCE, built
from tests.prep.verify.damage import FILES


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden data set. Who changes it changes it back."""
    folder = built(SOURCE, tmp_path_factory.mktemp("verify") / "data")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == FILES
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "data"))
