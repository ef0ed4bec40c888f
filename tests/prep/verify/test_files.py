"""verify names every file whose bytes have changed, or that is missing or surplus, and blames no other."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prep.verify import verify
from shared.manifest import load_build, load_manifest
from tests.prep.verify.damage import EVERY, FILES, flipped, named

BORDERS = [0, 1, 5, 9, 10, 60, 126, 127, 128, 129, -1, -2, -5, -8, -9, -100]  # of headers and footers


def test_a_whole_data_set_passes_and_is_left_untouched(data: Path) -> None:
    before = {file: ((data / file).read_bytes(), (data / file).stat().st_mtime_ns) for file in FILES}
    result = verify(data, deep=EVERY)
    documents = sum(split.documents for split in load_manifest(data).splits.values())
    assert result.json() == {"ok": True, "id": load_manifest(data).id, "bad": []}
    assert result.reencoded == documents
    assert {file: ((data / file).read_bytes(), (data / file).stat().st_mtime_ns) for file in FILES} == before


@pytest.mark.parametrize("file", FILES)
def test_a_flip_at_any_border_of_any_file_is_found_and_named(data: Path, file: str) -> None:
    for position in BORDERS:
        before = flipped(data / file, position, 0x01)
        assert named(data) == [file], position
        (data / file).write_bytes(before)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flip_anywhere_is_found_and_named(whole: Path, file: str, place: float, mask: int) -> None:
    before = flipped(whole / file, int(place * (whole / file).stat().st_size), mask)
    try:
        assert named(whole) == [file]
    finally:
        (whole / file).write_bytes(before)


@pytest.mark.parametrize(("file", "load"), [("manifest.json", load_manifest), ("build.json", load_build)])
def test_a_flip_in_every_byte_of_the_json_files_is_found(data: Path, file: str, load: Callable[[Path], object]) -> None:
    size = (data / file).stat().st_size
    for position in range(size):
        before = flipped(data / file, position, 1 << position % 7)
        with pytest.raises(ValueError, match=file):
            load(data)
        (data / file).write_bytes(before)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), tail=st.binary(max_size=3))
def test_truncation_and_growth_are_found_and_named(whole: Path, file: str, place: float, tail: bytes) -> None:
    before = (whole / file).read_bytes()
    changed = before + tail if tail else before[: int(place * len(before))]
    (whole / file).write_bytes(changed)
    try:
        assert named(whole) == [file]
    finally:
        (whole / file).write_bytes(before)


@pytest.mark.parametrize("file", FILES)
def test_absence_and_other_kinds_of_file_are_named(data: Path, file: str) -> None:
    (data / file).rename(data.parent / "aside")
    assert named(data) == [file]
    (data / file).mkdir()
    assert named(data) == [file]
    (data / file).rmdir()
    (data / file).symlink_to(data / "nowhere")
    assert named(data) == [file]


def test_surplus_files_are_named(data: Path) -> None:
    surplus = ["notes.txt", "train/00003.npy", "train/documents.parquet.tmp", "extra/deep/x"]
    for file in surplus:
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / file).write_bytes(b"x")
    (data / "val/link").symlink_to("00000.npy")
    assert named(data) == sorted([*surplus, "val/link"])


def test_swapped_shards_are_both_named(data: Path) -> None:
    first, second = data / "train/00000.npy", data / "train/00001.npy"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    assert named(data) == ["train/00000.npy", "train/00001.npy"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.sets(st.sampled_from(FILES), min_size=1))
def test_all_bad_files_are_named_at_once(whole: Path, files: set[str]) -> None:
    before = {file: flipped(whole / file, -3, 0x20) for file in files}
    try:
        found = named(whole)
    finally:
        for file, data in before.items():
            (whole / file).write_bytes(data)
    if "manifest.json" in files:  # without it, only what build.json states can be judged
        stated = {
            "manifest.json",
            "build.json",
            *([] if "build.json" in files else [f for f in files if "parquet" in f]),
        }
        files = files & stated
    elif "build.json" in files:  # an index's content is in the manifest, but what lies around it is in build.json
        found = [file for file in found if "parquet" not in file]
        files = {file for file in files if "parquet" not in file}
    assert found == sorted(files)
