"""AutoTokenizer on an export gives every text the ids of SentencePiece, `<s>` first, and decodes like it."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.tokenizer import Tokenizer, load_tokenizer
from tests.train.dataset import GOLDEN
from train.export import tokenizer as files

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
SHARED = Path(__file__).parents[4] / "shared"


def shipped(tokenizer: Tokenizer, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Any:
    """What AutoTokenizer makes of the files beside a BitNet config.json, after `change`."""
    folder.mkdir(exist_ok=True)
    files.write(folder, tokenizer, 1024)
    pipeline, config = (
        json.loads((folder / name).read_bytes()) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    change(pipeline, config)
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}')
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)


def as_it_is(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    pass


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return load_tokenizer(GOLDEN / "tokenizer.model")


@pytest.fixture(scope="module")
def encoder(golden: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return shipped(golden, tmp_path_factory.mktemp("tokenizer"), as_it_is)


PIECES = st.sampled_from(
    ["<s>", "</s>", "<unk>", "<0x0A>", "<0xE2>", " ", "  ", "\u2581", "\n", "\r", "\t", "\0", "a", "the", "==", "é",
     "e\u0301", "👍🏽", "中", "\u00a0", "\ufeff"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join))


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
@example(text="a </s> b")
@example(text="  two  spaces  ")
def test_every_text_has_the_ids_of_sentencepiece(golden: Tokenizer, encoder: Any, text: str) -> None:
    assert files.differences(encoder, golden, [text]) is None
    assert encoder(text)["input_ids"] == [1, *golden.processor.encode(text)], "called as people call it"
    assert encoder(text, add_special_tokens=False)["input_ids"] == golden.processor.encode(text)


def test_all_texts_of_the_proof_hold(golden: Tokenizer, encoder: Any) -> None:
    texts = list(files.proof_texts(golden))
    assert len(texts) > 5000 + golden.identity.vocab_size and set(files.HOSTILE) < set(texts)
    assert files.differences(encoder, golden, texts) is None


def test_an_end_written_in_a_text_is_text_and_the_real_one_is_an_id(golden: Tokenizer, encoder: Any) -> None:
    ids = encoder.encode("a</s>b<s>c<unk>")
    assert ids[0] == 1 and not {0, 1, 2} & set(ids[1:])
    assert (encoder.bos_token_id, encoder.eos_token_id, encoder.unk_token_id) == (1, 2, 0)
    assert encoder.convert_tokens_to_ids("</s>") == 2
    assert encoder.decode([*ids, 2], skip_special_tokens=True) == "a</s>b<s>c<unk>"


def test_a_batch_and_a_saved_copy_are_the_same(golden: Tokenizer, encoder: Any, tmp_path: Path) -> None:
    texts = [*files.HOSTILE]
    want = [encoder.encode(text) for text in texts]
    assert encoder(texts)["input_ids"] == want
    encoder.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == want


def no_split(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    del config["split_special_tokens"]


def as_converted(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    """What Transformers makes of a LLaMA model."""
    pipeline["normalizer"] = None
    pipeline["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False
    }  # fmt: skip


def no_bytes(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    pipeline["model"]["byte_fallback"] = False


def no_bos(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    pipeline["post_processor"] = None


def no_strip(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    pipeline["decoder"]["decoders"].pop()


def another_order(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    pipeline["model"]["merges"].reverse()


def left_out(pipeline: dict[str, Any], config: dict[str, Any]) -> None:
    pipeline["model"]["merges"].pop(len(pipeline["model"]["merges"]) // 2)


@pytest.mark.parametrize(
    "fault",
    [no_split, as_converted, no_bytes, no_bos, no_strip, another_order, left_out],
)
def test_a_wrong_tokenizer_is_noticed(golden: Tokenizer, tmp_path: Path, fault: Callable[..., None]) -> None:
    assert files.differences(shipped(golden, tmp_path, fault), golden, list(files.proof_texts(golden)))


@pytest.mark.parametrize("name", ["unigram", "squeeze", "user_symbols"])
def test_a_model_that_cannot_be_written_so_is_noticed(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(GOLDEN / f"{name}.model")
    assert files.differences(shipped(tokenizer, tmp_path, as_it_is), tokenizer, list(files.proof_texts(tokenizer)))


@pytest.mark.corpus
def test_real_documents_have_the_ids_of_the_genuine_model(tmp_path: Path) -> None:
    models, corpora = sorted(SHARED.glob("tokenizer/*.model")), sorted(SHARED.glob("corpus/*.parquet"))
    if not models or not corpora:
        pytest.skip("no ../shared")
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(models[0])
    encoder = shipped(tokenizer, tmp_path, as_it_is)
    texts = [
        text for path in corpora for text in pq.ParquetFile(path).read_row_group(0, ["text"])["text"].to_pylist()[:60]
    ]
    joints = [a[-50:] + "  " + b[:50] for a, b in pairwise(texts)]
    assert len(texts) > 200
    assert files.differences(encoder, tokenizer, texts + joints) is None
