"""`make pilot` with nothing named: FineWeb-Edu's listing and LLaMA-2's tokenizer come from the Hub, in bad weather."""

import sys
from pathlib import Path

import pytest

from tests.prep.builds import LLAMA
from tests.prep.hub_builds import add_default_tokenizer, environment, hub_of, write_files
from tests.prep.hub_server import Fault, once, serving
from tests.train.test_pilot import ARGS, SIZE, evals, make, tree  # noqa: F401


@pytest.mark.corpus
@pytest.mark.skipif(not LLAMA.exists(), reason="no ../shared")
def test_the_pilot_takes_every_default_from_the_hub(
    tree: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = tmp_path_factory.mktemp("hub")
    write_files(files)
    hub = hub_of(files)
    add_default_tokenizer(hub)
    hub.faults.append(once(Fault(503), lambda r: r.path.endswith(".parquet"), times=2))
    hub.faults.append(once(Fault(429, {"Retry-After": "1"}), lambda r: r.storage))
    with serving(hub):
        for name, value in environment(hub, tree).items():
            monkeypatch.setenv(name, value)
        code, out, err = make(
            tree, "pilot", PYTHON=sys.executable, PRESET="tiny", ARGS=ARGS, STEPS=1, PILOT_SIZE=SIZE.format(24)
        )
    assert (code, err) == (0, ""), err
    assert evals(tree) == ["step-1.json"] and "a rehearsal" in out.splitlines()[-1]
