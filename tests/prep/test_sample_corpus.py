"""The sample corpus: real prose of this installation, in FineWeb-Edu's schema, the same bytes each time."""

import os
import resource
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep import sample_corpus
from prep.sample_corpus import RECORD, Sample, docstrings, prose, write_sample_corpus
from shared.tokenizer import load_tokenizer
from tests.prep.builds import one_line_error, prep

DEMO_TOKENS = (300 * 8 + 64) * 1024 + 2  # what `make demo` trains on and validates with


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sample]:
    out = tmp_path_factory.mktemp("sample") / "corpus"
    return out, write_sample_corpus(out)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_corpus, "MAX_BYTES", 500_000)
    monkeypatch.setattr(sample_corpus, "MIN_BYTES", 400_000)


def test_it_has_the_schema_and_layout_of_fineweb_edu(whole: tuple[Path, Sample]) -> None:
    out, sample = whole
    strings = ["text", "id", "dump", "url", "file_path", "language"]
    for file in sorted(out.glob("*.parquet")):
        with pq.ParquetFile(file) as parquet:
            types = {field.name: str(field.type) for field in parquet.schema_arrow}
            assert list(types)[:6] == strings and {types[name] for name in strings} == {"string"}
            assert types["language_score"] == types["score"] == "double"
            assert types["token_count"] == types["int_score"] == "int64" and len(types) == 10
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            assert set(sizes[:-1]) <= {1000} and sizes[-1] <= 1000
            assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    assert rows(out).num_rows == sample.documents


def test_its_numbers_are_true_and_enough_for_the_demo(whole: tuple[Path, Sample]) -> None:
    out, sample = whole
    table = rows(out)
    texts = table["text"].to_pylist()
    processor = load_tokenizer(out / "tokenizer.model").processor
    counts = [len(ids) for ids in processor.encode(texts)]
    assert counts == table["token_count"].to_pylist() and sum(counts) == sample.tokens
    assert sum(map(len, texts)) == sample.characters
    assert len(set(texts)) == len(texts) and len(set(table["id"].to_pylist())) == len(texts)
    assert sum(len(text.encode()) for text in texts) <= 8_000_000
    assert sample.tokens + 2 * sample.documents >= DEMO_TOKENS


def test_its_tokenizer_was_trained_as_llamas(whole: tuple[Path, Sample]) -> None:
    processor = load_tokenizer(whole[0] / "tokenizer.model").processor
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"] and sum(processor.is_byte(i) for i in range(len(pieces))) == 256
    assert "▁▁▁▁" in pieces and not any(sum(c.isdigit() for c in piece) > 1 for piece in pieces[259:])
    text = "  two  spaces, ﬁ, １, 𝔛, \t\r\n and 2024 </s>"
    assert processor.decode(processor.encode(text)) == text


def test_the_command_writes_the_same_bytes_within_the_time(whole: tuple[Path, Sample], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = prep("sample-corpus", "--out", tmp_path / "again", env={**os.environ, "PYTHONHASHSEED": "42"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"wrote {whole[1].documents:,} documents" in done.stdout
    assert contents(tmp_path / "again") == contents(whole[0])
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15  # of one core; there are two
    assert names(tmp_path) == ["again"]
    done = prep("sample-corpus", "--out", tmp_path / "again")
    assert done.returncode == 0 and "already complete" in done.stdout
    (tmp_path / "again" / RECORD).unlink()
    assert "choose another --out" in one_line_error(prep("sample-corpus", "--out", tmp_path / "again"), 1)


def test_run_again_it_changes_nothing_and_says_so(whole: tuple[Path, Sample]) -> None:
    out, sample = whole
    before = contents(out)
    again = write_sample_corpus(out)
    assert (again.documents, again.characters, again.tokens) == (sample.documents, sample.characters, sample.tokens)
    assert sample.new and not again.new and contents(out) == before


@pytest.mark.usefixtures("small")
def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    write_sample_corpus(tmp_path / "corpus")
    for file in sorted((tmp_path / "corpus").iterdir()):
        data = file.read_bytes()
        for damaged in (data[:-3] + b"\0" + data[-2:], data[:-1], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            elif file.name == RECORD:
                continue  # then the folder is no sample corpus at all: the next test
            with pytest.raises(ValueError, match=f"{file.name}: missing or damaged; remove the folder"):
                write_sample_corpus(tmp_path / "corpus")
        file.write_bytes(data)
    assert not write_sample_corpus(tmp_path / "corpus").new


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(ValueError, match="not empty and not a sample corpus; choose another --out"):
            write_sample_corpus(out)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    assert names(tmp_path) == ["file", "mine"]


@pytest.mark.usefixtures("small")
def test_a_failure_leaves_no_half_and_the_same_call_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sample_corpus(tmp_path / "expected")
    out = tmp_path / "new" / "corpus"
    write = sample_corpus.write_durably
    for failing in sorted(contents(tmp_path / "expected")):

        def full(path: Path, data: bytes, failing: str = failing) -> None:
            if path.name == failing:
                path.write_bytes(data[:10])
                raise OSError(28, "No space left on device")
            write(path, data)

        monkeypatch.setattr(sample_corpus, "write_durably", full)
        with pytest.raises(OSError, match="No space left"):
            write_sample_corpus(out)
        assert not out.exists()
    monkeypatch.setattr(sample_corpus, "write_durably", write)
    out.mkdir()  # an empty folder is nobody's
    assert write_sample_corpus(out).new
    assert contents(out) == contents(tmp_path / "expected")
    assert names(out.parent) == ["corpus"]


def test_an_installation_without_source_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_corpus, "PACKAGES", ["no_such_package"])
    monkeypatch.setattr(sample_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"holds only \d+ bytes of prose"):
        write_sample_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_what_several_files_say_alike_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for i in range(300):
        own = " ".join(f"word{(i * j * j) % 997}" for j in range(60))
        (library / f"p{i}").mkdir(parents=True)
        (library / f"p{i}" / "m.py").write_text(f'"""{"The licence of everything. " * 10}"""\ndef f(): """{own}"""\n')
    monkeypatch.setattr(sample_corpus, "PACKAGES", [])
    monkeypatch.setattr(sample_corpus, "MIN_BYTES", 1)
    monkeypatch.setattr(sample_corpus.sysconfig, "get_path", lambda name: str(library))
    write_sample_corpus(tmp_path / "corpus")
    texts = rows(tmp_path / "corpus")["text"].to_pylist()
    assert sum("word0 " in text for text in texts) == 300
    assert sum("The licence of everything." in text for text in texts) == 1


def test_documents_are_a_mixture_from_the_first_row_on(whole: tuple[Path, Sample]) -> None:
    table = rows(whole[0])
    assert set(table["dump"].to_pylist()[:200]) == set(table["dump"].to_pylist())
    hashes = [sha256(text.encode()).digest() for text in table["text"].to_pylist()]
    assert hashes == sorted(hashes)


def test_source_is_parsed_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    source = f'''"""Module."""
open({str(mark)!r}, "w").close()
if True:
    class A:
        """Class.
              Indented.
            Less.
        """
        def f(self):
            r"""Method \\d."""
            def g():
                """Inner."""
async def h():
    """Last."""
    "not a docstring"
'''
    found = ["Module.", "Class.\n  Indented.\nLess.", "Method \\d.", "Inner.", "Last."]
    assert list(docstrings(source.encode())) == found
    assert not mark.exists()


def test_doctests_go_and_the_prose_around_them_stays() -> None:
    text = "Add.\n\nExamples\n--------\n>>> 1 + 1\n2\n>>> for i in x:\n...     i\n\nMore prose.\n\n\n\n    kept\n"
    assert prose(text) == "Add.\n\nExamples\n--------\n\nMore prose.\n\n    kept"
    assert prose("Add.\n\nExamples\n--------\n>>> 1\n1\n") == "Add."
    assert prose("Add.\n\nExample\n-------\n>>> 1\n1\n\nNotes\n-----\nNone.") == "Add.\n\nNotes\n-----\nNone."
    assert prose(">>> 1\n1") == "" and prose("half a pair \ud83d") == ""


@given(st.text(alphabet=st.sampled_from("> .a\n\t-é\ud800"), max_size=60))
def test_prose_is_text_that_can_be_stored(docstring: str) -> None:
    text = prose(docstring)
    assert text.encode().decode() == text
    assert not any(line.strip().startswith(">>>") for line in text.split("\n"))
    assert prose(text) == text


@given(st.binary(max_size=80).map(lambda data: b'"""' + data))
def test_no_source_file_stops_the_search(data: bytes) -> None:
    assert all(isinstance(text, str) for text in docstrings(data))
