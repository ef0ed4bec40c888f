"""plan tells what a build will take before it takes it, and the build's first lines say the same."""

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prep.forecast import Speed, forecast
from prep.plan import Plan, Settings
from prep.sources import Unit, group_units
from tests.prep.builds import SOURCE, TOKENIZER, one_line_error, prep, tokenize_arguments
from tests.prep.hub_builds import SMALL, environment, hub_of, hub_tokenize, write_files
from tests.prep.hub_server import serving

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


def test_what_is_wrong_is_told_before_it_is_built(tmp_path: Path) -> None:
    assert "no such file" in one_line_error(prep(*plan_arguments(tmp_path / "none", tmp_path / "out")), 1)
    bad = plan_arguments(SOURCE, tmp_path / "out", tokenizer=SOURCE / "lines.txt")
    assert "not a SentencePiece model" in one_line_error(prep(*bad), 1)
    lines = prep(*plan_arguments(SOURCE, tmp_path / "out", tokenizer=TOKENIZER)).stdout.splitlines()
    assert [line.split("about")[0].strip() for line in lines] == ["to read", "to download", "on disk", "to encode"]
    assert "measured on one core" in lines[3] and "are free" in lines[2]
