"""plan tells what a build will take before it takes it, and the build's first lines say the same."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.forecast import Speed, forecast
from prep.plan import Plan, Settings
from prep.sources import Unit, group_units
from tests.prep.builds import ROOT, SOURCE, TOKENIZER, one_line_error, prep, tokenize_arguments
from tests.prep.hub_builds import CARD, COMMIT, FINEWEB, SMALL, environment, hub_of, hub_tokenize, write_files
from tests.prep.hub_server import Hub, Repository, Tail, serving

DEFAULT = Settings(1_920_000, 10_240, 1024, 1 << 26, "shuffled", 0, 8 << 20)


def plan_arguments(source: object, out: Path, **options: object) -> list[str]:
    return ["plan", *tokenize_arguments(source, out, **options)[1:]]


def test_the_default_job_is_planned_in_seconds() -> None:
    """FineWeb-Edu's sample-10BT as its listing says: 14 files, 9,672,101 rows in groups of 1,000, 28.5 GB packed."""
    began = time.monotonic()
    rows, total, units = 9_672_101, 28_500_000_000, []
    for file in range(14):
        count = rows // 14 + (file < rows % 14)
        groups = [1000] * (count // 1000) + [count % 1000]
        packed = [total * n // rows for n in groups]
        units += group_units(f"sample/10BT/{file:03d}_00000.parquet", packed, groups, [2 * n for n in packed], 8 << 20)
    plan = Plan(units, DEFAULT.order, DEFAULT.seed)
    size = {unit: total * (unit.rows or 0) // rows for unit in units}
    speed = Speed(bytes_per_token=4.5, tokens_per_second=10e6)
    found = forecast(plan.tracks, DEFAULT, lambda unit: unit.unpacked * 0.9, size.__getitem__, speed, 2, 10**12)
    assert time.monotonic() - began < 5
    wanted = 1_920_000 * 1024 + 1 + 10_240 * 1024 + 1
    assert found.tokens == wanted and found.enough and found.units_listed == len(units)
    per_unit = 2 * 0.9 * sum(size.values()) / 4.5 / len(units)
    assert found.units == pytest.approx(wanted / per_unit, rel=0.02)
    assert found.documents == pytest.approx(9_672_101 * found.units / len(units), rel=0.02)
    assert found.download_bytes == pytest.approx(28.5e9 * found.units / len(units), rel=0.02)
    assert found.seconds == pytest.approx(wanted / 20e6)
    assert found.disk_needed > 2 * wanted


def test_a_source_that_is_too_small_is_told() -> None:
    units = [Unit("a.parquet", i * 10, 10, (i, i + 1), 4000) for i in range(5)]
    found = forecast(units, DEFAULT, lambda unit: 4000, lambda unit: 7, Speed(4, 1e6), 1, 0)
    assert not found.enough and (found.units, found.documents, found.download_bytes) == (5, 50, 35)
    assert "too small" in "\n".join(found.lines())


def test_a_file_of_unknown_length_has_unknown_documents() -> None:
    units = [Unit("a.jsonl.zst", 0, None), Unit("b.txt", 0, 10, offset=0)]
    found = forecast(units, DEFAULT, lambda unit: 4000, lambda unit: 0, Speed(4, 1e6), 1, 0)
    assert found.documents is None and "? documents" in found.lines()[0]


@pytest.mark.parametrize("kind", ["lines", "parquet"])
def test_the_estimates_are_near_what_the_build_then_takes(kind: str, tmp_path: Path) -> None:
    source: Path = SOURCE
    if kind == "parquet":
        source = tmp_path / "source"
        write_files(source)
    options = {"train_sequences": 1200 if kind == "parquet" else 600, "unit_bytes": 30_000, "workers": 2}
    told = prep(*plan_arguments(source, tmp_path / "out", **options), "--json")
    assert told.returncode == 0 and told.stderr == "" and told.stdout.count("\n") == 1
    plan = json.loads(told.stdout)
    assert not list(tmp_path.glob("out*")), "plan changes nothing"
    assert prep(*tokenize_arguments(source, tmp_path / "out", **options)).returncode == 0
    splits = json.loads((tmp_path / "out/manifest.json").read_text())["splits"].values()
    assert plan["tokens"] == sum(split["tokens"] for split in splits)
    assert plan["enough"] and plan["download_bytes"] == 0 and plan["workers"] == 2
    # A unit here is a large part of the whole, which no estimate can see through.
    assert 0.4 * plan["documents"] < sum(split["documents"] for split in splits) < 1.6 * plan["documents"]
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert 0.3 * size < plan["disk_needed"] < 3 * size


def test_the_hub_is_planned_without_reading_a_unit(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    with serving(hub_of(tmp_path / "files")) as hub:
        env = environment(hub, tmp_path)
        arguments = plan_arguments("x", tmp_path / "out", **SMALL)
        at = arguments.index("--source")
        told = prep(*arguments[:at], *arguments[at + 2 :], "--json", env=env)
        assert told.returncode == 0 and told.stderr == "", told.stderr
        plan = json.loads(told.stdout)
        footers = sum(pq.read_metadata(path).serialized_size + 16 for path in (tmp_path / "files").rglob("*.parquet"))
        assert sum(count for name, count in hub.served.items() if name.endswith(".parquet")) == footers
        hub.served.clear()
        done = hub_tokenize(hub, tmp_path / "out", env=env)
        fetched = sum(count for name, count in hub.served.items() if name.endswith(".parquet")) - footers
    assert 0.5 * fetched < plan["download_bytes"] < 2 * fetched
    assert f"of {plan['units_listed']} units" in done.stdout and "to download  about" in done.stdout


def test_text_on_the_hub_is_planned_without_downloading_it(tmp_path: Path) -> None:
    lines = (SOURCE / "prose.jsonl").read_bytes()
    content = {"a.jsonl": lines * 20, "b.jsonl": lines * 30, "c.txt": b"x\n" * 9999}
    hub = Hub({"O/texts": Repository("datasets", {COMMIT: content}, {"main": COMMIT})})
    with serving(hub):
        arguments = plan_arguments("hf://O/texts", tmp_path / "out", train_sequences=500, workers=2)
        told = prep(*arguments, "--json", env=environment(hub, tmp_path))
        assert told.returncode == 0, told.stderr
        assert not hub.served.keys() & content.keys()
        plan = json.loads(told.stdout)
        assert plan["download_bytes"] == sum(map(len, content.values())), "the build counts the lines of all"
        assert plan["enough"] and plan["documents"] is None and plan["units_listed"] == 3
        done = prep("tokenize", *arguments[1:], env=environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr
        assert sum(hub.served[name] for name in content) == plan["download_bytes"]
        again = json.loads(prep(*arguments, "--json", env=environment(hub, tmp_path)).stdout)
    assert again["download_bytes"] == 0 and again["documents"] > 0, "once it is here its lines are counted"


def test_what_is_wrong_is_told_before_it_is_built(tmp_path: Path) -> None:
    assert "no such file" in one_line_error(prep(*plan_arguments(tmp_path / "none", tmp_path / "out")), 1)
    bad = plan_arguments(SOURCE, tmp_path / "out", tokenizer=SOURCE / "lines.txt")
    assert "not a SentencePiece model" in one_line_error(prep(*bad), 1)
    lines = prep(*plan_arguments(SOURCE, tmp_path / "out", tokenizer=TOKENIZER)).stdout.splitlines()
    assert [line.split("about")[0].strip() for line in lines] == ["to read", "to download", "on disk", "to encode"]
    assert "measured on one core" in lines[3] and "are free" in lines[2]


def test_a_part_of_the_files_stands_for_all() -> None:
    """A hundredth of the full FineWeb-Edu: 1.3e12 tokens in 2,410 files of 2 GB."""
    units = [Unit(f"{i:03d}", 3000 * k, 3000, (k, k + 1), 14_000_000) for i in range(24) for k in range(256)]
    all_of_it = Settings(1_200_000_000, 1_000_000, 1024, 1 << 26, "shuffled", 0, 8 << 20)
    found = forecast(units, all_of_it, lambda _: 1e7, lambda _: 8 << 20, Speed(4.6, 2e7), 8, 10**13, 24 / 2410)
    assert found.units_listed == 256 * 2410 == pytest.approx(616_960)
    assert found.units == pytest.approx(found.tokens * 4.6 / 1e7, rel=1e-4) and found.enough
    assert found.documents == pytest.approx(3000 * found.units, rel=1e-4)
    assert found.download_bytes == pytest.approx((8 << 20) * found.units, rel=1e-4)
    assert found.disk_needed > 2 * found.tokens > 2.4e12
    more = Settings(1_400_000_000, 1_000_000, 1024, 1 << 26, "shuffled", 0, 8 << 20)
    assert not forecast(units, more, lambda _: 1e7, lambda _: 1, Speed(4.6, 2e7), 8, 0, 24 / 2410).enough
    small = forecast(units, DEFAULT, lambda _: 1e7, lambda _: 1, Speed(4.6, 2e7), 8, 0, 24 / 2410)
    assert small.units == pytest.approx(small.tokens * 4.6 / 1e7, abs=1) and small.units_listed == 616_960


def test_thousands_of_files_on_the_hub_are_planned_in_seconds_by_few_requests(tmp_path: Path) -> None:
    """The default config of FineWeb-Edu: 2,410 files, of which the Hub here has only the footers."""
    chance = random.Random(0)
    texts = [chance.randbytes(10_000).hex() for _ in range(210)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "one.parquet", row_group_size=30, write_statistics=False)
    data = (tmp_path / "one.parquet").read_bytes()
    tail = Tail(len(data), data[-(int.from_bytes(data[-8:-4], "little") + 8) :])
    folders = [f"CC-MAIN-{2013 + i // 10}-{i % 10:02d}" for i in range(110)]
    files: dict[str, bytes | Tail] = {f"data/{f}/{k:05d}.parquet": tail for f in folders for k in range(22)}
    files = dict(list(files.items())[:2410]) | {"README.md": CARD}
    hub = Hub({FINEWEB: Repository("datasets", {COMMIT: files}, {"main": COMMIT})})
    arguments = plan_arguments(
        f"hf://{FINEWEB}@{COMMIT}?config=default", tmp_path / "out", train_sequences=10**6, seq_len=1024, unit_bytes=1
    )
    code = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(done.returncode)"
    with serving(hub):
        command = [sys.executable, "-c", code, sys.executable, "-m", "prep", *arguments, "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=100
        )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["units_listed"] == 7 * 2410 and plan["share"] == pytest.approx(32 / 2410)
    assert 7 * 32 < plan["units"] < 7 * 2410 and plan["enough"]
    assert len(hub.requests) < 150, "two for a footer, and two hops for each"
    assert int(done.stderr) < 400 << 10, "KB of memory"
