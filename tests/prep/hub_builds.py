"""What the tests of the Hub share: a small repository in the shape of FineWeb-Edu, and runs of the CLI against it."""

import os
import random
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prep.defaults import SOURCE as DEFAULT_SOURCE
from tests.prep.builds import LLAMA, TOKENIZER, golden_rows, prep, tokenize_arguments
from tests.prep.hub_server import Hub, Repository, Request

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # of the default --source
NEWER = "b" * 40
FINEWEB = "HuggingFaceFW/fineweb-edu"
LLAMA_2 = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # of the default --tokenizer
CARD = b"""---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb-Edu
"""
ON_MAIN = f"hf://{FINEWEB}?config=sample-10BT"
HUB_TOKENIZER = "hf://O/tokenizer/tokenizer.model"
SMALL = {"tokenizer": HUB_TOKENIZER, "train_sequences": 1200, "unit_bytes": 30_000, "workers": 2}


def write_files(folder: Path, files: int = 3, copies: int = 3) -> None:
    """The data files of the repository, on this disk. No two of their texts are equal.

    Without statistics, because those of such small row groups would make the footers as large as the data.
    """
    rows = golden_rows()
    for number in range(files):
        texts = [f"{number} {copy} {row['text'] or ''}" for copy in range(copies) for row in rows]
        random.Random(number).shuffle(texts)  # so that one part of a file is like another
        table = pa.table({"text": texts, "id": [f"{number}/{i}" for i in range(len(texts))]})
        path = folder / "sample" / "10BT" / f"{number:03d}_00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=40, compression="zstd", write_statistics=False)


def hub_of(folder: Path) -> Hub:
    """A Hub that has those files in its dataset, beside others that nobody asked for, and the golden tokenizer."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
    other = {"README.md": CARD, "data/CC-MAIN-2013-20/train-00000-of-00014.parquet": b"not asked for" * 999}
    return Hub(
        {
            FINEWEB: Repository("datasets", {COMMIT: {**files, **other}}, {"main": COMMIT}),
            "O/tokenizer": Repository(
                "models", {"a" * 40: {"tokenizer.model": TOKENIZER.read_bytes()}}, {"main": "a" * 40}
            ),
        }
    )


def add_default_tokenizer(hub: Hub) -> Repository:
    """LLAMA_2 with its real model, of ../shared; returned to be changed."""
    commits = {"c" * 40: {"tokenizer.model": LLAMA.read_bytes()}}
    hub.repositories[LLAMA_2] = Repository("models", commits, {"main": "c" * 40})
    return hub.repositories[LLAMA_2]


def spans(request: Request) -> bool:
    """Of a unit, not of a footer."""
    return request.storage and request.range is not None and request.range[1] - request.range[0] > 1000


def data(request: Request) -> bool:
    """Of a parquet file, whatever part of it."""
    return "/api/" not in request.path and request.path.endswith(".parquet")


def environment(hub: Hub, home: Path, **variables: str) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = home / "hf-home"
    return {**mine, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}


def hub_tokenize(
    hub: Hub, out: Path, *extra: str, source: str = DEFAULT_SOURCE, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """`prep tokenize` of the small repository; the Hub's cache is a folder beside `out`."""
    arguments = tokenize_arguments(source, out, **{**SMALL, **options})
    return prep(*arguments, *extra, env=env or environment(hub, out.parent))
