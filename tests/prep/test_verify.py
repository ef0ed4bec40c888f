"""verify finds whatever is wrong with a data set, names the file, and blames no other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prep.verify import verify
from shared.durable import sha256_file
from shared.index import SCHEMA, ContentHash
from shared.manifest import load_build, load_manifest, seal, text_of
from tests.prep.builds import GOLDEN, SOURCE, golden_rows, one_line_error, prep, tokenize_arguments, write_parquet

FILES = [
    "build.json",
    "manifest.json",
    "tokenizer.model",
    "train/00000.npy",
    "train/00001.npy",
    "train/00002.npy",
    "train/documents.parquet",
    "val/00000.npy",
    "val/documents.parquet",
]
BORDERS = [0, 1, 5, 9, 10, 60, 126, 127, 128, 129, -1, -2, -5, -8, -9, -100]  # of headers and footers
EVERY = 10**6  # documents for --deep: all of them


def build(out: Path, **options: object) -> Path:
    done = prep(*tokenize_arguments(options.pop("source", SOURCE), out, **options))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("verify") / "data")
    assert names(folder) == FILES
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def named(folder: Path, **options: Any) -> list[str]:
    result = verify(folder, **options)
    assert result.ok == (not result.bad)
    return [problem.file for problem in result.bad]


def flipped(path: Path, position: int, mask: int) -> bytes:
    """Flip bits of one byte in place; returns what the file held before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= mask
    path.write_bytes(after)
    return before


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


# From here on the damage is hidden: hashes, seals and id are made to fit, as a faulty builder or a forger would.


def reseal(data: Path, edit: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make every recorded hash true again, then `edit` the manifest and seal it."""
    manifest = json.loads((data / "manifest.json").read_bytes())
    record = json.loads((data / "build.json").read_bytes())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = sha256_file(data / shard["file"])
        index = data / split["index"]["file"]
        content = ContentHash()
        for batch in pq.read_table(index).select(SCHEMA.names).cast(SCHEMA).to_batches():
            content.update(batch)
        split["index"]["content_sha256"] = content.hexdigest()
        record["indexes"][split["index"]["file"]] = {"bytes": index.stat().st_size, "sha256": sha256_file(index)}
    edit(manifest)
    (data / "manifest.json").write_bytes(text_of(seal(manifest, "id")))
    (data / "build.json").write_bytes(text_of(seal(record, "sha256")))


def set_token(data: Path, file: str, position: int, token: int) -> None:
    content = bytearray((data / file).read_bytes())
    at = 128 + position * 2 if position >= 0 else len(content) + position * 2
    content[at : at + 2] = token.to_bytes(2, "little")
    (data / file).write_bytes(content)


def problem_of(data: Path, file: str, **options: Any) -> str:
    """The one problem of a data set, which must be that of `file`."""
    result = verify(data, **options)
    assert [problem.file for problem in result.bad] == [file], result.bad
    return result.bad[0].problem


def edit_index(data: Path, split: str, change: Callable[[dict[str, list[Any]]], None]) -> str:
    file = f"{split}/documents.parquet"
    columns = pq.read_table(data / file).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=SCHEMA), data / file)
    return file


def test_resealing_alone_changes_nothing(data: Path) -> None:
    before = (data / "manifest.json").read_bytes()
    reseal(data)
    assert (data / "manifest.json").read_bytes() == before and named(data) == []


@pytest.mark.parametrize(("file", "position"), [("train/00000.npy", 77), ("train/00002.npy", -1), ("val/00000.npy", 9)])
def test_an_id_outside_the_vocabulary_is_named(data: Path, file: str, position: int) -> None:
    set_token(data, file, position, 1000)
    reseal(data)
    assert problem_of(data, file) == "holds id 1000, the vocabulary ends at 999"


@pytest.mark.parametrize(
    ("old", "new"), [(b"<u2", b"<i2"), (b"<u2", b">u2"), (b"(3000,)", b"(2999,)"), (b"\x01\x00v", b"\x02\x00v")]
)
def test_a_header_of_another_type_or_length_is_named(data: Path, old: bytes, new: bytes) -> None:
    shard = data / "train/00001.npy"
    content = shard.read_bytes()
    assert content[:128].count(old) == 1
    shard.write_bytes(content[:128].replace(old, new) + content[128:])
    reseal(data)
    assert "its header does not say 3000 little-endian uint16 tokens" in problem_of(data, "train/00001.npy")


def test_a_missing_or_stray_frame_is_named(data: Path) -> None:
    rows = pq.read_table(data / "train/documents.parquet").to_pylist()
    inside = next(
        row for row in rows if row["start"] > 3000 and row["start"] + row["length"] < 6000 and row["length"] > 9
    )
    start, end = inside["start"] - 3000, inside["start"] - 3000 + inside["length"] - 1
    shard = (data / "train/00001.npy").read_bytes()
    cases = {
        (start, 300): f"<s> is missing at token {start} of the shard",
        (end, 300): f"</s> is missing at token {end} of the shard",
        (start + 3, 1): f"<s> stands inside a document, at token {start + 3} of the shard",
        (start + 3, 2): f"</s> stands inside a document, at token {start + 3} of the shard",
    }
    for (position, token), problem in cases.items():
        set_token(data, "train/00001.npy", position, token)
        reseal(data)
        assert problem_of(data, "train/00001.npy") == problem
        (data / "train/00001.npy").write_bytes(shard)


def test_the_first_and_the_last_frame_are_checked(data: Path) -> None:
    manifest = load_manifest(data)
    assert manifest.splits["train"].last_document.tokens_dropped, "the golden build cuts its last document"
    set_token(data, "train/00000.npy", 0, 300)
    reseal(data)
    assert "<s> is missing at token 0" in problem_of(data, "train/00000.npy")
    set_token(data, "train/00000.npy", 0, 1)

    def complete(m: dict[str, Any]) -> None:
        m["splits"]["train"]["last_document"]["tokens_dropped"] = 0

    reseal(data, complete)
    assert "</s> is missing" in problem_of(data, "train/00002.npy")
    set_token(data, "train/00002.npy", -1, 2)
    reseal(data, complete)
    assert named(data) == []


GAPS = "do not follow each other without gaps"


def column(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row] = value

    return change


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (column("start", 5, 0), GAPS),
        (column("length", 3, 2), GAPS),
        (column("length", 3, -1), GAPS),
        (
            lambda columns: [
                values.insert(4, 0 if name == "length" else values[4]) for name, values in columns.items()
            ],
            GAPS,
        ),
        (column("file", 2, "other.jsonl"), "names rows that the source does not have"),
        (column("row", 2, -1), "names rows that the source does not have"),
        (column("url", 2, None), "has empty cells"),
        (column("id", -1, "another"), "last document is not the one"),
        (lambda columns: [values.pop() for values in columns.values()], "documents and"),
        (lambda columns: [values.pop(0) for values in columns.values()], GAPS),
        (lambda columns: columns.update({name: values[:0] for name, values in columns.items()}), "has 0 documents"),
    ],
)
def test_an_index_that_contradicts_itself_is_named(data: Path, change: Callable[..., Any], problem: str) -> None:
    file = edit_index(data, "train", change)
    reseal(data)
    assert problem in problem_of(data, file)


def test_an_index_of_another_content_is_named_whatever_its_file_hash(data: Path) -> None:
    content = load_manifest(data).splits["val"].index.content_sha256
    file = edit_index(data, "val", column("url", 0, "https://elsewhere.example"))
    reseal(data, lambda m: m["splits"]["val"]["index"].update(content_sha256=content))
    assert problem_of(data, file) == "its content is not what the manifest says"


def test_an_index_with_other_columns_is_named(data: Path) -> None:
    table = pq.read_table(data / "val/documents.parquet")
    reordered = table.select(["length", *(name for name in table.column_names if name != "length")])
    pq.write_table(reordered, data / "val/documents.parquet")
    reseal(data)
    assert "its columns are not those of an index" in problem_of(data, "val/documents.parquet")


def test_a_text_in_both_splits_is_named(data: Path) -> None:
    held = pq.read_table(data / "val/documents.parquet")["text_sha256"][-1].as_py()
    file = edit_index(data, "train", column("text_sha256", 7, held))
    reseal(data)
    assert "stands in val as well" in problem_of(data, file)


def test_a_manifest_that_contradicts_itself_is_named(data: Path) -> None:
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda m: m.update(format_version=2),
        lambda m: m.update(note="x"),
        lambda m: m.pop("skipped"),
        lambda m: m["splits"]["train"].update(tokens=m["splits"]["train"]["tokens"] - 1),
        lambda m: m["splits"]["train"].update(sequences="60"),
        lambda m: m["splits"]["train"]["shards"].reverse(),
        lambda m: m["splits"]["train"]["index"].update(rows=1),
        lambda m: m.update(shard_tokens=1000),
    ]
    before = (data / "manifest.json").read_bytes()
    for edit in edits:
        reseal(data, edit)
        assert problem_of(data, "manifest.json")
        (data / "manifest.json").write_bytes(before)


@pytest.mark.parametrize("model", ["unigram", "no_bos"])
def test_another_tokenizer_is_named(data: Path, model: str) -> None:
    shutil.copyfile(GOLDEN / f"{model}.model", data / "tokenizer.model")
    reseal(data, lambda m: m["tokenizer"].update(sha256=sha256_file(data / "tokenizer.model")))
    assert problem_of(data, "tokenizer.model")


def test_deep_finds_a_token_that_only_the_text_can_tell(data: Path) -> None:
    row = pq.read_table(data / "train/documents.parquet").to_pylist()[11]
    at = row["start"] + 4
    for token in (300, 999):
        set_token(data, f"train/{at // 3000:05d}.npy", at % 3000, token)
        reseal(data)
        reseal(data, lambda m: m["splits"]["train"].update(utf8_bytes=counted(data, "train")))
        assert named(data) == []
        file = f"train/{at // 3000:05d}.npy"
        assert f"token {at} of train (token 4 of document {row['id']!r})" in problem_of(data, file, deep=EVERY)


@pytest.mark.parametrize(("split", "file"), [("train", "train/00000.npy"), ("val", "val/00000.npy")])
def test_deep_looks_into_both_splits_even_for_two_documents(data: Path, split: str, file: str) -> None:
    set_token(data, file, 2, 999)
    reseal(data)
    reseal(data, lambda m: m["splits"][split].update(utf8_bytes=counted(data, split)))
    assert "not what SentencePiece gives" in problem_of(data, file, deep=2)


def counted(data: Path, split: str) -> int:
    """What verify counts as utf8_bytes of a split whose number is wrong."""
    problem = verify(data, deep=1).bad[0].problem
    assert problem.startswith(f"utf8_bytes of {split} "), problem
    return int(problem.split()[-1])


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m["splits"]["val"].update(utf8_bytes=m["splits"]["val"]["utf8_bytes"] + 1), "utf8_bytes of val"),
        (lambda m: m["splits"]["train"].update(utf8_bytes=0), "utf8_bytes of train"),
        (lambda m: m["splits"]["train"]["last_document"].update(tokens_dropped=3), "3 tokens were dropped"),
    ],
)
def test_deep_finds_numbers_that_only_the_text_can_tell(data: Path, edit: Callable[..., Any], problem: str) -> None:
    reseal(data, edit)
    assert named(data) == []
    assert problem in problem_of(data, "manifest.json", deep=EVERY)


def test_deep_finds_an_index_that_lies_about_the_text(data: Path) -> None:
    file = edit_index(data, "train", column("text_sha256", 4, bytes(32)))
    reseal(data)
    assert named(data) == []
    assert "row 4: row " in problem_of(data, file, deep=EVERY)


def test_deep_reads_every_kind_of_source_and_model(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    rows = golden_rows()
    source = tmp_path / "source"
    source.mkdir()
    (source / "0.txt").write_bytes((SOURCE / "lines.txt").read_bytes())
    (source / "1.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows[:40]))
    write_parquet(source / "2" / "rows.parquet", rows[40:90], group_rows=20)
    packed = "".join(json.dumps(row) + "\n" for row in rows[90:]).encode()
    (source / "3.jsonl.zst").write_bytes(zstandard.compress(packed[:30_000]) + zstandard.compress(packed[30_000:]))
    for model in ("tokenizer", "unigram", "user_symbols", "squeeze"):
        tokenizer = GOLDEN / f"{model}.model"
        out = build(tmp_path / model, source=source, tokenizer=tokenizer, train_sequences=450, order="listed")
        files = set(pq.read_table(out / "train/documents.parquet")["file"].to_pylist())
        assert files == {"0.txt", "1.jsonl", "2/rows.parquet", "3.jsonl.zst"}
        assert named(out, deep=EVERY) == []


def test_deep_checks_as_many_documents_as_asked_in_both_splits(whole: Path) -> None:
    assert [verify(whole, deep=n).reencoded for n in (1, 2, 7)] == [1, 2, 7]


def test_deep_does_not_blame_the_data_for_another_source(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SOURCE, tmp_path / "copy"))
    assert named(data, deep=EVERY, source=str(copy)) == []
    lines = (copy / "prose.jsonl").read_bytes().split(b"\n")
    (copy / "prose.jsonl").write_bytes(b"\n".join(lines[1:] + lines[:1]))
    with pytest.raises(ValueError, match=r"prose.jsonl: is not the file that the data set was made from"):
        verify(data, deep=EVERY, source=str(copy))
    (copy / "prose.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no file prose.jsonl"):
        verify(data, deep=EVERY, source=str(copy))
    with pytest.raises(ValueError, match="no such file or directory"):
        verify(data, deep=1, source=str(tmp_path / "nowhere"))


def test_deep_asks_for_the_source_where_none_is_recorded(data: Path) -> None:
    record = {key: value for key, value in load_build(data).items() if key != "source"}
    (data / "build.json").write_bytes(text_of(seal(record, "sha256")))
    assert named(data) == [] and named(data, deep=3, source=str(SOURCE)) == []
    with pytest.raises(ValueError, match=r"build.json: does not say where the source is; give --source"):
        verify(data, deep=3)


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


def test_large_shards_are_checked_across_read_borders(tmp_path: Path) -> None:
    rows = [{"text": f"{i} river " * 20_000, "id": str(i)} for i in range(30)]
    write_parquet(tmp_path / "long.parquet", rows, group_rows=5)
    out = build(tmp_path / "out", source=tmp_path / "long.parquet", train_sequences=10_000, shard_tokens=1_200_000)
    assert named(out, deep=EVERY) == []
    at = (1 << 19) - 64 + 1  # the second token of the second read
    assert np.load(out / "train/00000.npy", mmap_mode="r")[at] > 2
    set_token(out, "train/00000.npy", at, 1)
    reseal(out)
    assert problem_of(out, "train/00000.npy") == f"<s> stands inside a document, at token {at} of the shard"


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
