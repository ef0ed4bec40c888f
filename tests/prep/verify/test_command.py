"""What prep verify says, and that it needs to write nothing."""

import json
from pathlib import Path

import pytest

from prep.verify import verify
from shared.manifest import load_manifest
from tests.prep.builds import one_line_error, prep
from tests.prep.verify.damage import (
    flipped,
    named,
)


def test_the_command_says_what_it_checked(whole: Path) -> None:
    done = prep("verify", whole, "--deep", 5)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert load_manifest(whole).id in done.stdout and "5 documents" in done.stdout
    done = prep("verify", whole, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"ok": True, "id": load_manifest(whole).id, "bad": []}


def test_the_command_names_every_bad_file_and_fails_in_one_line(data: Path) -> None:
    bad = ["tokenizer.model", "train/00001.npy"]
    for file in bad:
        flipped(data / file, 200, 1)
    done = prep("verify", data)
    error = one_line_error(done, 1)
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == bad
    assert str(data) in error and all(file in error for file in bad)
    done = prep("verify", data, "--json")
    one_line_error(done, 1)
    said = json.loads(done.stdout)
    assert list(said) == ["ok", "id", "bad"] and not said["ok"] and said["id"] == load_manifest(data).id
    assert [list(problem) for problem in said["bad"]] == [["file", "problem"]] * 2
    assert [problem["file"] for problem in said["bad"]] == bad
    flipped(data / "manifest.json", 30, 1)
    said = json.loads(prep("verify", data, "--json").stdout)
    assert said["id"] is None and [problem["file"] for problem in said["bad"]] == ["manifest.json"]


def test_the_command_tells_what_it_cannot_do_in_one_line(whole: Path, tmp_path: Path) -> None:
    assert "no such folder" in one_line_error(prep("verify", tmp_path / "nothing"), 1)
    error = one_line_error(prep("verify", whole, "--deep", 3, "--source", tmp_path / "gone"), 1)
    assert "gone: no such file or directory" in error


def test_verify_works_on_a_data_set_that_may_not_be_written(data: Path) -> None:
    for path in [data, *data.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert named(data, deep=3) == []
    for path in [data, *data.rglob("*")]:
        path.chmod(0o755)


def test_no_folder_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        verify(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert named(tmp_path / "empty") == ["build.json", "manifest.json"]
