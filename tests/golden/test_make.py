"""The golden material is what its script makes, and holds the traps it is there for."""

import hashlib
import json
import runpy
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from shared.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent
SOURCE = GOLDEN / "source"
SHA256 = "68f5843e575a59e11d27a792031c1485187e7c28ba1bd25e244ec0b0967e244b"


def texts() -> list[str | None]:
    lines = [line for file in sorted(SOURCE.glob("*.jsonl")) for line in file.read_text("utf-8").split("\n") if line]
    return [json.loads(line)["text"] for line in lines]


def test_the_committed_source_is_what_the_script_writes(tmp_path: Path) -> None:
    runpy.run_path(str(GOLDEN / "make.py"))["write_source"](tmp_path)
    for file in sorted(SOURCE.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in SOURCE.iterdir())


def test_the_source_has_not_changed_since_ids_were_recorded_for_it() -> None:
    files = [*sorted(SOURCE.iterdir()), GOLDEN / "tokenizer.model"]
    assert hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() == SHA256


def test_it_holds_empty_texts_copies_and_every_trap() -> None:
    found = texts()
    assert None in found and "" in found
    whole = [text for text in found if text]
    assert len(set(whole)) < len(whole) - 10
    for trap in [
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "\r\n",
        "\t",
        "   ",
        "▁",
        "\x00",
        "\ufeff",
        "\u0301",
        "\u200d",
        "字",
    ]:
        assert any(trap in text for text in whole), repr(trap)
    assert max(len(word) for text in whole for word in text.split()) >= 10_000


def test_the_tokenizer_has_the_traits_of_llamas() -> None:
    processor = load_tokenizer(GOLDEN / "tokenizer.model").processor
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert [processor.bos_id(), processor.eos_id(), processor.unk_id(), len(pieces)] == [1, 2, 0, 1000]
    assert sum(processor.is_byte(i) for i in range(1000)) == 256
    assert all(set(piece) == {"▁"} for piece in pieces if "▁" in piece[1:])
    assert not any("\n" in piece or "\t" in piece for piece in pieces) and any("\r" in piece for piece in pieces)
    assert not any(
        len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces if not piece.startswith("<0x")
    )
    assert all(processor.decode(processor.encode(text)) == text for text in texts() if text and "▁" not in text)


@pytest.mark.parametrize("name", ["unigram", "user_symbols", "squeeze"])
def test_the_other_models_can_frame_documents(name: str) -> None:
    assert load_tokenizer(GOLDEN / f"{name}.model").identity.vocab_size == 500


def test_a_model_without_bos_is_refused() -> None:
    assert SentencePieceProcessor(model_file=str(GOLDEN / "no_bos.model")).bos_id() == -1
    with pytest.raises(ValueError, match="no bos piece"):
        load_tokenizer(GOLDEN / "no_bos.model")
