"""A dataset on the Hub gives the bytes that its files here give, in every weather, and by default."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prep.defaults import TOKENIZER as DEFAULT_TOKENIZER
from tests.prep.builds import LLAMA, ROOT, SOURCE, TOKENIZER, bytes_of, one_line_error, prep, tokenize_arguments
from tests.prep.hub_builds import (
    COMMIT,
    FINEWEB,
    NEWER,
    SMALL,
    add_default_tokenizer,
    data,
    environment,
    hub_tokenize,
    spans,
)
from tests.prep.hub_server import Fault, Hub, Repository, once


def test_the_hub_and_files_here_give_the_same_shards(whole: dict[str, bytes], files: Path, tmp_path: Path) -> None:
    arguments = tokenize_arguments(files, tmp_path / "out", **{**SMALL, "tokenizer": TOKENIZER})
    assert prep(*arguments).returncode == 0
    local = bytes_of(tmp_path / "out")
    assert {name for name in local if local[name] != whole[name]} == {"manifest.json"} and set(local) == set(whole)
    ours, theirs = json.loads(local["manifest.json"]), json.loads(whole["manifest.json"])
    assert ours.pop("id") != theirs.pop("id")
    source = theirs.pop("source")
    assert {**source, "kind": "files", "repository": None, "config": None, "revision": None} == ours.pop("source")
    assert (source["kind"], source["repository"], source["config"]) == ("hf", FINEWEB, "sample-10BT")
    assert source["revision"] == COMMIT
    assert [file["name"] for file in source["files"]] == [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
    assert ours == theirs


def test_every_default_works_with_all_faults_on(files: Path, tmp_path: Path, hub: Hub, whole: dict[str, bytes]) -> None:
    """No --source is given; the server limits, fails, cuts and delays, and the bytes are the same."""
    hub.faults += [
        once(Fault(429, {"Retry-After": "1"}), lambda r: "/tree/" in r.path),
        once(Fault(503), lambda r: "/tree/" in r.path),
        once(Fault(500), lambda r: "README" in r.path),
        once(Fault(429, {"RateLimit": '"resolvers";r=0;t=1'}), lambda r: data(r) and not r.storage),
        once(Fault(503), data, times=2),
        once(Fault(cut=700), spans, times=3),
        once(Fault(cut=0), data),
        once(Fault(pause=0.02), spans),
    ]
    arguments = tokenize_arguments(None, tmp_path / "out", **SMALL)
    at = arguments.index("--source")
    done = prep(*arguments[:at], *arguments[at + 2 :], env=environment(hub, tmp_path))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "rate limit (429): waiting 1 s" in done.stdout
    assert bytes_of(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-home", "out"]


@pytest.mark.corpus
@pytest.mark.skipif(not LLAMA.exists(), reason="no ../shared")
def test_make_tokenize_works_with_every_default_and_faults_on(tmp_path: Path, hub: Hub) -> None:
    add_default_tokenizer(hub)
    hub.faults += [once(Fault(503), data, times=3), once(Fault(cut=700), spans, times=3)]
    hub.faults.append(once(Fault(429, {"Retry-After": "1"}), lambda r: r.storage))
    smaller = "ARGS=--train-sequences 100 --val-sequences 4 --seq-len 128"
    command = ["make", "tokenize", f"PYTHON={sys.executable}", f"DATA={tmp_path / 'out'}", smaller]
    env = environment(hub, tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert prep("verify", tmp_path / "out", "--deep", 10, env=env).returncode == 0


@pytest.mark.corpus
@pytest.mark.skipif(not LLAMA.exists(), reason="no ../shared")
def test_the_default_tokenizer_is_the_pinned_one(tmp_path: Path, hub: Hub) -> None:
    repository = add_default_tokenizer(hub)
    done = hub_tokenize(hub, tmp_path / "out", tokenizer=DEFAULT_TOKENIZER)
    assert done.returncode == 0, done.stderr
    repository.commits["c" * 40] = {"tokenizer.model": b"another"}
    env = environment(hub, tmp_path / "other")
    line = one_line_error(hub_tokenize(hub, tmp_path / "out2", tokenizer=DEFAULT_TOKENIZER, env=env), 1)
    assert "expected 9e556afd" in line


def test_files_that_are_not_parquet_are_read_whole(tmp_path: Path, hub: Hub) -> None:
    import zstandard

    rows = (SOURCE / "prose.jsonl").read_bytes()
    content = {
        "a.jsonl": rows,
        "b/c.jsonl.zst": zstandard.compress(rows.replace(b"the", b"this")),
        "d.txt": (SOURCE / "lines.txt").read_bytes(),
        ".hidden/e.txt": b"no",
        "f.csv": b"no",
    }
    hub.repositories["O/texts"] = Repository("datasets", {NEWER: content}, {"main": NEWER})
    options = {"train_sequences": 200, "order": "listed", "unit_bytes": 1}
    assert (done := hub_tokenize(hub, tmp_path / "out", source="hf://O/texts", **options)).returncode == 0, done.stderr
    for name, content_ in content.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_)
    (tmp_path / "local/.hidden/e.txt").unlink()
    options = {**SMALL, **options, "tokenizer": TOKENIZER}
    assert prep(*tokenize_arguments(tmp_path / "local", tmp_path / "here", **options)).returncode == 0
    ours, theirs = bytes_of(tmp_path / "here"), bytes_of(tmp_path / "out")
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json"}
