"""What verify finds in a manifest, or a tokenizer that it describes, whose seal was made to fit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.durable import sha256_file
from tests.prep.builds import GOLDEN
from tests.prep.verify.damage import problem_of, reseal


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
