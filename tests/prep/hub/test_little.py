"""Of a dataset on the Hub only what is needed is read, and nothing twice."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
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
from tests.prep.hub_server import Fault, Hub, Request, once, serving


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
    assert bytes_of(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-home", "out"]
    fetched = {(name, first) for name in {r.name or "" for r in hub.requests} for first, _ in hub.ranges(name)}
    assert len(done_before) >= 3 and not fetched & done_before
    assert not any(map(of_a_footer(hub), hub.requests)), "footers are kept"
    assert prep(*arguments, env=environment(hub, tmp_path)).stdout.count("already complete") == 1


def of_a_footer(hub: Hub) -> Callable[[Request], bool]:
    """Whether a request asks for a parquet file's end, which no unit has."""
    sizes = {name: len(content) for name, content in hub.repositories[FINEWEB].commits[COMMIT].items()}
    return lambda r: r.range is not None and r.range[1] == sizes.get(r.name or "")


def interrupted(hub: Hub, folder: Path) -> Path:
    """A build that has all footers and was refused its units: the folder of its footers."""
    hub.faults.append(lambda r: Fault(403) if spans(r) and not of_a_footer(hub)(r) else None)
    one_line_error(hub_tokenize(hub, folder / "out"), 1)
    hub.faults.clear()
    hub.requests.clear()
    return folder / "out.partial" / "footers"


def test_only_the_footers_that_are_missing_are_fetched_again(tmp_path: Path, hub: Hub, whole: dict[str, bytes]) -> None:
    first, *others = sorted(interrupted(hub, tmp_path).iterdir())
    assert len(others) == 2 and all(COMMIT in path.name for path in others)
    first.unlink()
    assert hub_tokenize(hub, tmp_path / "out").returncode == 0
    assert bytes_of(tmp_path / "out") == whole
    again = {r.name for r in filter(of_a_footer(hub), hub.requests)}
    assert again == {"sample/10BT/000_00000.parquet"}


def test_a_footer_of_another_file_is_not_used(tmp_path: Path, hub: Hub, whole: dict[str, bytes]) -> None:
    for path in interrupted(hub, tmp_path).iterdir():  # as a file with the same name and another sha256 left it
        number, commit, sha256 = path.stem.split("-")
        path.rename(path.with_name(f"{number}-{commit}-{sha256[::-1]}.footer"))
    assert hub_tokenize(hub, tmp_path / "out").returncode == 0
    assert bytes_of(tmp_path / "out") == whole
    assert len({r.name for r in filter(of_a_footer(hub), hub.requests)}) == 3


def test_a_damaged_footer_is_told_and_fetched_by_the_next_start(tmp_path: Path, hub: Hub) -> None:
    first = min(interrupted(hub, tmp_path).iterdir())
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    assert "000_00000.parquet: not a readable parquet file" in one_line_error(hub_tokenize(hub, tmp_path / "out"), 1)
    assert hub_tokenize(hub, tmp_path / "out").returncode == 0


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
