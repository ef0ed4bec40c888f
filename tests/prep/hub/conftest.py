from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prep.builds import bytes_of
from tests.prep.hub_builds import hub_of, hub_tokenize, write_files
from tests.prep.hub_server import Hub, serving


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="session")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data set as an undisturbed build from the Hub makes it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with serving(hub_of(files)) as hub:
        assert (done := hub_tokenize(hub, out)).returncode == 0, done.stderr
    return bytes_of(out)


@pytest.fixture
def hub(files: Path) -> Iterator[Hub]:
    with serving(hub_of(files)) as hub:
        yield hub
