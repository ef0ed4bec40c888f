"""Of a dataset on the Hub only what is needed is read, and nothing twice."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.prep.builds import ROOT, bytes_of, one_line_error, prep, tokenize_arguments
from tests.prep.hub_builds import (
    COMMIT,
    FINEWEB,
    NEWER,
    ON_MAIN,
    SMALL,
    environment,
    hub_of,
    hub_tokenize,
    spans,
    write_files,
)
from tests.prep.hub_server import Fault, Hub, once, serving


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
    assert bytes_of(tmp_path / "out") == whole and sorted(path.name for path in tmp_path.iterdir()) == [
        "hf-home",
        "out",
    ]
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
