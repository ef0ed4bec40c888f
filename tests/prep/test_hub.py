"""A dataset on the Hub: pinned, read only where it is needed, the same bytes as from files here, in every weather."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prep.builds import LLAMA, ROOT, TOKENIZER, bytes_of, one_line_error, prep, tokenize_arguments
from tests.prep.hub_builds import COMMIT, FINEWEB, NEWER, ON_MAIN, SMALL, environment, hub_of, hub_tokenize, write_files
from tests.prep.hub_server import Fault, Hub, Repository, Request, once, serving

LLAMA_2 = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
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


def spans(request: Request) -> bool:
    return request.storage and request.range is not None and request.range[1] - request.range[0] > 1000


def data(request: Request) -> bool:
    return "/api/" not in request.path and request.path.endswith(".parquet")


def only_out(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {"out", "hf-home"}


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
    assert bytes_of(tmp_path / "out") == whole and only_out(tmp_path)


@pytest.mark.corpus
@pytest.mark.skipif(not LLAMA.exists(), reason="no ../shared")
def test_make_tokenize_works_with_every_default_and_faults_on(tmp_path: Path, hub: Hub) -> None:
    hub.repositories[LLAMA_2] = Repository(
        "models", {"c" * 40: {"tokenizer.model": LLAMA.read_bytes()}}, {"main": "c" * 40}
    )
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
    from prep import defaults

    hub.repositories[LLAMA_2] = Repository(
        "models", {"c" * 40: {"tokenizer.model": LLAMA.read_bytes()}}, {"main": "c" * 40}
    )
    done = hub_tokenize(hub, tmp_path / "out", tokenizer=defaults.TOKENIZER)
    assert done.returncode == 0, done.stderr
    hub.repositories[LLAMA_2].commits["c" * 40] = {"tokenizer.model": b"another"}
    env = environment(hub, tmp_path / "other")
    line = one_line_error(hub_tokenize(hub, tmp_path / "out2", tokenizer=defaults.TOKENIZER, env=env), 1)
    assert "expected 9e556afd" in line


def test_a_tenth_of_the_corpus_fetches_little_more_than_a_tenth_of_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("large")
    write_files(folder, files=4, copies=14)
    with serving(hub_of(folder)) as hub:
        done = hub_tokenize(hub, tmp_path / "out", train_sequences=100_000)
        holds = int(one_line_error(done, 1).partition("--train-sequences ")[2].split()[0])
        hub.served.clear()
        assert hub_tokenize(hub, tmp_path / "tenth", train_sequences=holds // 10).returncode == 0
        total = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        fetched = sum(count for name, count in hub.served.items() if name.endswith(".parquet"))
    assert 0.08 * total < fetched < 0.14 * total


def test_no_byte_of_a_unit_is_fetched_twice_when_transfers_are_cut(
    tmp_path: Path, hub: Hub, whole: dict[str, bytes]
) -> None:
    hub.faults.append(once(Fault(cut=5000), spans, times=20))
    assert hub_tokenize(hub, tmp_path / "out").returncode == 0
    assert bytes_of(tmp_path / "out") == whole
    asked = [r.range for r in hub.requests if spans(r) and r.range]
    again = [
        (first, stop) for first, stop in asked if any(stop == other and first == start + 5000 for start, other in asked)
    ]
    assert len(again) >= 5, "a cut transfer goes on at its byte"
    starts = [(name, first) for name in hub.served for first, _ in hub.ranges(name)]
    assert len(starts) == len(set(starts)), "and no part is asked for twice"


def test_a_killed_build_goes_on_without_fetching_what_it_has(tmp_path: Path, hub: Hub, whole: dict[str, bytes]) -> None:
    arguments = tokenize_arguments(ON_MAIN, tmp_path / "out", **SMALL)
    slow = Fault(pause=0.1)
    hub.faults.append(lambda r: slow if spans(r) else None)
    command = [sys.executable, "-m", "prep", *arguments]
    journal = tmp_path / "out.partial" / "journal.json"
    with subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL) as process:
        while not (journal.exists() and json.loads(journal.read_bytes()).get("cursor", {}).get("track", 0) >= 3):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    tracks = json.loads(journal.read_bytes())["cursor"]["track"]
    order = planned(hub, tmp_path)
    done_before = {(name, first) for name, first, _ in order[:tracks]}
    kept = {path.name for path in (tmp_path / "out.partial" / "download").glob("*.span")}
    assert not kept & {span for _, _, span in order[: tracks - 1]}, "what is written is not kept"
    hub.requests.clear()
    hub.repositories[FINEWEB].branches["main"] = NEWER  # whose files are others: it has none
    again = prep(*arguments, env=environment(hub, tmp_path))
    assert again.returncode == 0, again.stderr
    assert bytes_of(tmp_path / "out") == whole and only_out(tmp_path)
    fetched = {(name, first) for name in {r.name or "" for r in hub.requests} for first, _ in hub.ranges(name)}
    assert len(done_before) >= 3 and not fetched & done_before
    assert prep(*arguments, env=environment(hub, tmp_path)).stdout.count("already complete") == 1


def planned(hub: Hub, home: Path) -> list[tuple[str, int, str]]:
    """(file, first byte, name while it is here) of each unit in the order of the plan, found in a process apart."""
    code = """if True:
        import json, sys
        from prep.plan import Plan
        from prep.sources import all_units, open_source
        from prep.spans import span_of
        source = open_source(sys.argv[1])
        plan = Plan(all_units(source, int(sys.argv[2])), "shuffled", 0)
        first = lambda u: span_of(source.metadata(u.file), u.groups)[0]
        print(json.dumps([(u.file, first(u), source.fetched().span_path(u).name) for u in plan.tracks]))
    """
    command = [sys.executable, "-c", code, f"hf://{FINEWEB}@{COMMIT}?config=sample-10BT", str(SMALL["unit_bytes"])]
    done = subprocess.run(command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True, check=True)
    return [(name, first, span) for name, first, span in json.loads(done.stdout)]


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


def test_no_access_gets_one_line_that_names_the_token_and_a_way_around(tmp_path: Path, hub: Hub) -> None:
    hub.repositories[FINEWEB].needs_token = "hf_right"
    for token, status in (("", 401), ("hf_wrong", 403)):
        variables = {"HF_TOKEN": token} if token else {}
        env = environment(hub, tmp_path, **variables)
        line = one_line_error(hub_tokenize(hub, tmp_path / "out", env=env), 1)
        assert str(status) in line and "HF_TOKEN" in line and "--source" in line and FINEWEB in line
    env = environment(hub, tmp_path, HF_TOKEN="hf_right")
    assert hub_tokenize(hub, tmp_path / "out", env=env).returncode == 0, "and with the token it is read"
    hub.repositories["O/tokenizer"].needs_token = "hf_right"
    env = environment(hub, tmp_path / "other")
    line = one_line_error(hub_tokenize(hub, tmp_path / "out2", env=env), 1)
    assert "HF_TOKEN" in line and "--tokenizer FILE.model" in line


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://HuggingFaceFW", "hf://OWNER/NAME"),
        ("hf://O/absent", "404"),
        (f"hf://{FINEWEB}@nobranch?config=sample-10BT", "404"),
        (f"hf://{FINEWEB}?config=sample-1T", "no config 'sample-1T'; add ?config=NAME"),
        (f"hf://{FINEWEB}@{'d' * 40}?config=sample-10BT", "404"),
    ],
)
def test_a_wrong_name_gets_one_line(tmp_path: Path, hub: Hub, source: str, expected: str) -> None:
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", source=source), 1)
    assert expected in line and source.partition("?")[0] in line
    assert not (tmp_path / "out.partial").exists()


def test_offline_reads_what_is_cached_and_says_what_is_not(tmp_path: Path, hub: Hub, whole: dict[str, bytes]) -> None:
    offline = environment(hub, tmp_path, HF_HUB_OFFLINE="1")
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", env=offline), 1)
    assert "HF_HUB_OFFLINE" in line and "tokenizer.model" in line
    code = """if True:
        from huggingface_hub import hf_hub_download, snapshot_download
        hf_hub_download("O/tokenizer", "tokenizer.model")
        snapshot_download("HuggingFaceFW/fineweb-edu", repo_type="dataset", revision="main",
                          allow_patterns=["README.md", "sample/10BT/00[01]*"])
    """
    subprocess.run([sys.executable, "-c", code], env=environment(hub, tmp_path), check=True, capture_output=True)
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", env=offline), 1)
    assert "002_00000.parquet: not in the Hub's cache" in line and "HF_HUB_OFFLINE" in line
    code = code.replace("00[01]*", "*")
    subprocess.run([sys.executable, "-c", code], env=environment(hub, tmp_path), check=True, capture_output=True)
    hub.requests.clear()
    done = hub_tokenize(hub, tmp_path / "out", "--restart", env=offline, source=ON_MAIN)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == whole and hub.requests == []
    online = hub_tokenize(hub, tmp_path / "again")
    assert online.returncode == 0 and bytes_of(tmp_path / "again") == whole
    assert not any(data(request) for request in hub.requests), "cached files are read where they are"


@pytest.mark.parametrize("least", [1000, 9000], ids=["footer", "unit"])
def test_a_signal_ends_a_wait_for_the_hub_at_once(least: int, tmp_path: Path, hub: Hub) -> None:
    def large(request: Request) -> bool:
        return spans(request) and request.range is not None and request.range[1] - request.range[0] > least

    hub.faults.append(lambda r: Fault(429, {"Retry-After": "500"}) if large(r) else None)
    arguments = tokenize_arguments(ON_MAIN, tmp_path / "out", **SMALL)
    command = [sys.executable, "-m", "prep", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "waiting 8 min 20 s" not in process.stdout.readline():
            assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75 and stderr.count("\n") == 1 and "same command goes on" in stderr
    assert time.monotonic() - began < 5


def test_files_that_are_not_parquet_are_read_whole(tmp_path: Path, hub: Hub) -> None:
    import zstandard

    from tests.prep.builds import SOURCE

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


def test_verify_deep_reads_the_hub_at_the_pinned_commit(tmp_path: Path, hub: Hub) -> None:
    assert hub_tokenize(hub, tmp_path / "out", source=ON_MAIN).returncode == 0
    hub.repositories[FINEWEB].branches.clear()
    done = prep("verify", tmp_path / "out", "--deep", 20, env=environment(hub, tmp_path))
    assert done.returncode == 0 and "20 documents" in done.stdout, done.stderr


def test_a_broken_parquet_file_at_the_hub_is_named(tmp_path: Path, hub: Hub) -> None:
    content = hub.repositories[FINEWEB].commits[COMMIT]
    name = "sample/10BT/000_00000.parquet"
    good = content[name]
    content[name] = good[:-4] + b"nope"
    line = one_line_error(hub_tokenize(hub, tmp_path / "out"), 1)
    assert name in line and "not a readable parquet file" in line
    content[name] = good[:4000] + bytes(140_000) + good[144_000:]
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", "--restart"), 1)
    assert name in line and "damaged near row" in line


def test_local_parquet_needs_neither_datasets_nor_zstandard_nor_the_hub(tmp_path: Path, files: Path) -> None:
    arguments = tokenize_arguments(files, tmp_path / "out", **{**SMALL, "tokenizer": TOKENIZER})
    code = """if True:
        import sys
        for name in ("datasets", "zstandard", "huggingface_hub"):
            sys.modules[name] = None
        from prep.cli import main
        from shared.stop import run_cli
        run_cli(main, "prep")
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
