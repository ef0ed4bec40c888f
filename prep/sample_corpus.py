"""An offline stand-in for FineWeb-Edu: the English prose that a Python installation holds, and a tokenizer for it.

The text is pydoc's topics and the docstrings of the standard library and of packages that this program depends on.
Docstrings are read by parsing source files, so nothing of those packages is imported or run. One environment gives
one result, to the byte.
"""

import ast
import io
import platform
import re
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from shared.durable import exclusive, fsync_folder, require_space, sha256_file, write_durably
from shared.manifest import TOKENIZER, read_sealed, seal, text_of

RECORD = "sample.json"  # what was written, from what: its presence means that a folder is ours and complete
MAX_BYTES = 8_000_000  # of text
MIN_BYTES = 1_000_000  # less is no stand-in for anything
LONGEST = 5_000  # characters of a document of several docstrings
SHORTEST = 200  # characters of a docstring worth keeping
VOCABULARY = 2_048  # small, so that the text gives the demo the 2.5 M tokens that it trains on
ROW_GROUP = 1_000  # rows, as FineWeb-Edu has
FILE_ROWS = 2 * ROW_GROUP
SPACE_NEEDED = 50_000_000  # bytes of disk, generously

# After the topics and the standard library, in this order until MAX_BYTES are full. A package that is not there, or
# keeps no source, is passed over.
PACKAGES = [
    "numpy",
    "networkx",
    "pandas",
    "torch/nn",
    "torch/optim",
    "torch/utils",
    "torch/distributions",
    "torch/distributed",
    "torch/fx",
    "mpmath",
    "huggingface_hub",
    "datasets",
    "jinja2",
    "click",
    "fsspec",
    "sympy",
]
NOT_PROSE = {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "_vendor"}

# FineWeb-Edu's columns and types. Nobody has judged these texts: the three scores are null.
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),  # a package and its version
        ("url", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
        ("score", pa.float64()),
        ("int_score", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """A sample corpus on disk. `tokens` is without `<s>` and `</s>`; `new` says whether this call wrote it."""

    documents: int
    characters: int
    tokens: int
    new: bool


@dataclass(frozen=True)
class Text:
    """One document and where it was found; `id` is the file's path and a count within it."""

    text: str
    id: str
    package: str
    url: str
    path: str


def write_sample_corpus(out: Path) -> Sample:
    """Write `out`/*.parquet, `out`/tokenizer.model and their record; `out` appears whole or not at all.

    A complete sample corpus is left as it is. ValueError when `out` is anything else that is not empty, and when this
    installation holds too little prose.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out.with_name(out.name + ".sample-lock"), "prep sample-corpus"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return _complete(out)
        aside = out.with_name(out.name + ".sample-partial")
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed: seconds of work, so not resumed
        require_space(out.parent, SPACE_NEEDED, "a sample corpus")
        aside.mkdir()
        sample = _write(aside)
        aside.rename(out)
        fsync_folder(out.parent)
    return sample


def _complete(out: Path) -> Sample:
    """The sample corpus that stands at `out`, or a ValueError."""
    if not (out / RECORD).is_file():
        raise ValueError(f"{out}: not empty and not a sample corpus; choose another --out")
    damaged = "missing or damaged; remove the folder and run this again"
    try:
        record = read_sealed(out / RECORD, "sha256")
    except ValueError:
        raise ValueError(f"{out / RECORD}: {damaged}") from None
    for file, digest in record["files"].items():
        if not (out / file).is_file() or sha256_file(out / file) != digest:
            raise ValueError(f"{out / file}: {damaged}")
    return Sample(record["documents"], record["characters"], record["tokens"], new=False)


def _write(folder: Path) -> Sample:
    texts = _collect()
    model = _train_tokenizer(texts)
    write_durably(folder / TOKENIZER, model)
    processor = SentencePieceProcessor(model_proto=model)
    tokens = [len(ids) for ids in processor.encode([t.text for t in texts])]
    for i in range(0, len(texts), FILE_ROWS):
        table = _table(texts[i : i + FILE_ROWS], tokens[i : i + FILE_ROWS])
        data = io.BytesIO()
        pq.write_table(table, data, row_group_size=ROW_GROUP, compression="zstd")
        write_durably(folder / f"sample_{i // FILE_ROWS:05d}.parquet", data.getvalue())
    sample = Sample(len(texts), sum(len(t.text) for t in texts), sum(tokens), new=True)
    record = {
        "documents": sample.documents,
        "characters": sample.characters,
        "tokens": sample.tokens,
        "packages": sorted({t.package for t in texts}),
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    write_durably(folder / RECORD, text_of(seal(record, "sha256")))
    return sample


def _table(texts: list[Text], tokens: list[int]) -> pa.Table:
    unknown = [None] * len(texts)
    columns = {
        "text": [t.text for t in texts],
        "id": [t.id for t in texts],
        "dump": [t.package for t in texts],
        "url": [t.url for t in texts],
        "file_path": [t.path for t in texts],
        "language": ["en"] * len(texts),
        "language_score": unknown,
        "token_count": tokens,
        "score": unknown,
        "int_score": unknown,
    }
    return pa.table(columns, schema=SCHEMA)


def _train_tokenizer(texts: list[Text]) -> bytes:
    """A SentencePiece BPE trained with the options of LLaMA's, on lines."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for t in texts for line in t.text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,  # the number stands in the model, so it is fixed
        minloglevel=2,
    )
    return model.getvalue()


def _collect() -> list[Text]:
    """All documents, MAX_BYTES at most, none twice, ordered by their hash so that any part is a mixture."""
    found: dict[bytes, Text] = {}
    total = 0
    for text in _texts():
        data = text.text.encode()
        if total + len(data) > MAX_BYTES:
            break
        if found.setdefault(sha256(data).digest(), text) is text:
            total += len(data)
    if total < MIN_BYTES:
        raise ValueError(f"this Python installation holds only {total} bytes of prose; use text of your own")
    return [found[digest] for digest in sorted(found)]


def _texts() -> Iterator[Text]:
    version = platform.python_version()
    python, url = f"python {version}", f"https://docs.python.org/{version.rpartition('.')[0]}/"
    for topic, text in _topics():
        yield Text(text, f"pydoc_data/topics.py#{topic}", python, url, "pydoc_data/topics.py")
    seen: set[str] = set()
    yield from _documents(Path(sysconfig.get_path("stdlib")), "", python, url, seen)
    for folder in PACKAGES:
        name = folder.partition("/")[0]
        spec = util.find_spec(name)  # finds a package without importing it
        if spec is None or not spec.submodule_search_locations:
            continue
        root, version = Path(spec.submodule_search_locations[0]).parent, metadata.version(name)
        url = f"pkg:pypi/{name}@{version.partition('+')[0]}"  # a package URL, as in ECMA-427
        yield from _documents(root, folder, f"{name} {version}", url, seen)


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions keep pydoc apart
        return []
    return sorted((topic, prose(text)) for topic, text in topics.items())


def _documents(root: Path, folder: str, package: str, url: str, seen: set[str]) -> Iterator[Text]:
    """The documents of all source files under `root`/`folder`: a file's docstrings, cut between two of them."""
    for file in sorted((root / folder).rglob("*.py"), key=str):
        path = file.relative_to(root)
        if NOT_PROSE & set(path.parts):
            continue
        parts: list[str] = []
        for text in map(prose, docstrings(file.read_bytes())):
            if len(text) < SHORTEST or text in seen:
                continue
            seen.add(text)
            if parts and len(parts[-1]) + len(text) + 2 <= LONGEST:
                parts[-1] += "\n\n" + text
            else:
                parts.append(text)
        for i, text in enumerate(parts):
            yield Text(text, f"{path.as_posix()}#{i}", package, url, path.as_posix())


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a Python source file in order, dedented. A file that does not parse holds none."""
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        body = getattr(node, "body", None)
        if isinstance(body, list):  # of a module, class, function, if, try or with: where definitions stand
            stack.extend(reversed(body))


def prose(docstring: str) -> str:
    """A docstring without its doctests; empty when it holds what UTF-8 cannot."""
    kept: list[str] = []
    in_example = False
    for line in docstring.split("\n"):
        stripped = line.strip()
        in_example = stripped.startswith(">>>") or (in_example and stripped != "")  # its output ends at a blank line
        if not in_example:
            kept.append(line.rstrip())
    text = re.sub(r"(^|\n)Examples?\n-+\n+(?=$|[^\n]+\n-+\n)", r"\1", "\n".join(kept))  # nothing left under it
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n") if not re.search("[\ud800-\udfff]", text) else ""
