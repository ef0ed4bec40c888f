"""A dataset on the Hub is read at the commit and with the files that were found at first."""

import json
from pathlib import Path

import pytest

from tests.prep.builds import bytes_of, one_line_error, prep
from tests.prep.hub_builds import (
    COMMIT,
    FINEWEB,
    NEWER,
    ON_MAIN,
    environment,
    hub_tokenize,
    spans,
)
from tests.prep.hub_server import Fault, Hub, once


def test_a_moved_branch_does_not_change_a_build_but_a_new_one(
    tmp_path: Path, hub: Hub, whole: dict[str, bytes]
) -> None:
    stop_at_first = Fault(403)
    hub.faults.append(lambda r: stop_at_first if spans(r) else None)
    assert "HF_TOKEN" in one_line_error(hub_tokenize(hub, tmp_path / "out", source=ON_MAIN), 1)
    hub.faults.clear()
    repository = hub.repositories[FINEWEB]
    repository.commits[NEWER] = {
        name: content for name, content in repository.commits[COMMIT].items() if "002_" not in name
    }
    repository.branches["main"] = NEWER
    assert hub_tokenize(hub, tmp_path / "out", source=ON_MAIN).returncode == 0
    assert bytes_of(tmp_path / "out") == whole
    assert hub_tokenize(hub, tmp_path / "new", source=ON_MAIN).returncode == 0
    source = json.loads((tmp_path / "new" / "manifest.json").read_text())["source"]
    assert source["revision"] == NEWER and len(source["files"]) == 2
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", source=f"hf://{FINEWEB}@{NEWER}?config=sample-10BT"), 1)
    assert "another source" in line


@pytest.mark.parametrize("how", ["other bytes", "shorter", "longer"])
def test_a_file_that_changes_at_a_pinned_commit_is_named(tmp_path: Path, hub: Hub, how: str) -> None:
    hub.faults.append(lambda r: Fault(403) if spans(r) else None)
    hub_tokenize(hub, tmp_path / "out")
    hub.faults.clear()
    content = hub.repositories[FINEWEB].commits[COMMIT]
    name = "sample/10BT/001_00000.parquet"
    was = content[name]
    content[name] = {"other bytes": was[:-1] + b"x", "shorter": was[:-1000], "longer": was + was[-1000:]}[how]
    line = one_line_error(hub_tokenize(hub, tmp_path / "out"), 1)
    assert name in line and "changed at the Hub" in line and "--restart" in line


def test_verify_deep_reads_the_hub_at_the_pinned_commit(tmp_path: Path, hub: Hub) -> None:
    assert hub_tokenize(hub, tmp_path / "out", source=ON_MAIN).returncode == 0
    hub.repositories[FINEWEB].branches.clear()
    done = prep("verify", tmp_path / "out", "--deep", 20, env=environment(hub, tmp_path))
    assert done.returncode == 0 and "20 documents" in done.stdout, done.stderr


def test_one_json_object_is_all_that_verify_prints_while_it_waits(tmp_path: Path, hub: Hub) -> None:
    assert hub_tokenize(hub, tmp_path / "out").returncode == 0
    hub.faults.append(once(Fault(429, {"Retry-After": "1"}), spans))
    for extra in ([], ["--json"]):
        done = prep("verify", tmp_path / "out", "--deep", 20, *extra, env=environment(hub, tmp_path))
        assert done.returncode == 0 and done.stderr == "", done.stderr
        if not extra:
            assert "rate limit (429): waiting 1 s" in done.stdout
            hub.faults.append(once(Fault(429, {"Retry-After": "1"}), spans))
    assert json.loads(done.stdout)["ok"]
