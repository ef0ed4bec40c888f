"""The encoder gives what SentencePiece gives, on any text, for any model; and knows when its proof does not hold."""

import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import encoder as encoder_module
from prep import parts as parts_module
from prep.encoder import Encoder, unsafe_pairs
from shared.sentencepiece_model import BYTE, CONTROL, UNKNOWN, pieces, unsafe_reason
from shared.tokenizer import Tokenizer, load_tokenizer, piece_bytes
from tests.prep.builds import CORPUS, GOLDEN, LLAMA, TOKENIZER, golden_rows

MODELS = [TOKENIZER, GOLDEN / "unigram.model", GOLDEN / "user_symbols.model", GOLDEN / "squeeze.model"]
MODELS += [LLAMA] if LLAMA.exists() else []
TOKENIZERS = {path.name if path != LLAMA else "llama": load_tokenizer(path) for path in MODELS}
ENCODERS = {name: Encoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
FAST = [name for name, encoder in ENCODERS.items() if encoder.slow_reason is None]
GOLDEN_TEXTS = [row["text"] for row in golden_rows() if row["text"]]
PIECES = sorted({t.processor.id_to_piece(i) for t in TOKENIZERS.values() for i in range(0, t.identity.vocab_size, 9)})
FRAGMENTS = [
    *PIECES, "<s>", "</s>", "<unk>", "<0x0A>", "\r\n", "\r", "\n", "\t", " ", "  ", "   ", "▁", "▁▁", "\x00", "\ufeff",
    "e\u0301",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "字", "กำ", "ﷺ", "é", "'s", "n't", "0", "12",
    "3.14", "://", "…", "—", "“", "\u00a0", "\u3000",
]  # fmt: skip


def assert_same_ids(tokenizer: Tokenizer, encoder: Encoder, texts: list[str]) -> None:
    encoded = encoder.encode(pa.array(texts, pa.string()))
    p, sizes = tokenizer.processor, piece_bytes(tokenizer.processor)
    for i, text in enumerate(texts):
        ids = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]].tolist()
        assert ids == [p.bos_id(), *p.encode(text), p.eos_id()], repr(text)[:200]
        assert encoded.utf8_bytes[i] == int(sizes[ids].sum()) - (p.encode("a", out_type=str)[0][0] == "▁")
    assert encoded.offsets[-1] == len(encoded.tokens)


def test_only_the_plain_models_take_the_fast_path() -> None:
    reasons = {name: unsafe_reason(tokenizer) for name, tokenizer in TOKENIZERS.items()}
    assert reasons["tokenizer.model"] is None and reasons.get("llama") is None
    assert "not a BPE" in str(reasons["unigram.model"])
    assert "user-defined" in str(reasons["user_symbols.model"])
    assert "strips spaces" in str(reasons["squeeze.model"]) or "normalises" in str(reasons["squeeze.model"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_text_has_the_ids_of_sentencepiece(name: str) -> None:
    assert_same_ids(TOKENIZERS[name], ENCODERS[name], GOLDEN_TEXTS)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_literal_control_symbol_is_never_its_id(name: str) -> None:
    encoder, p = ENCODERS[name], TOKENIZERS[name].processor
    ids = encoder.encode(pa.array(["</s>", "a</s> <s>b", "<unk>"])).tokens.tolist()
    assert ids.count(p.eos_id()) == 3 and ids.count(p.bos_id()) == 3


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(FRAGMENTS), min_size=1).map("".join), min_size=1, max_size=8))
def test_any_mixture_of_fragments_has_the_ids_of_sentencepiece(name: str, texts: list[str]) -> None:
    assert_same_ids(TOKENIZERS[name], ENCODERS[name], texts)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8))
def test_any_text_has_the_ids_of_sentencepiece(name: str, texts: list[str]) -> None:
    assert_same_ids(TOKENIZERS[name], ENCODERS[name], texts)


@pytest.mark.parametrize("name", FAST)
def test_a_word_of_a_megabyte_has_the_ids_of_sentencepiece(name: str) -> None:
    chance = random.Random(0)
    word = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=1 << 20))
    assert_same_ids(TOKENIZERS[name], ENCODERS[name], [word, "字" * 300_000, "x"])


@pytest.mark.parametrize("name", FAST)
def test_every_character_and_every_pair_of_ascii_has_the_ids_of_sentencepiece(name: str) -> None:
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    ascii_ = [chr(c) for c in range(128)]
    chunks = ["".join(every[i : i + 5000]) for i in range(0, len(every), 5000)]
    assert_same_ids(TOKENIZERS[name], ENCODERS[name], [*chunks, *ascii_, *(a + "".join(ascii_) for a in ascii_)])


def test_every_piece_cut_anywhere_has_the_ids_of_sentencepiece() -> None:
    """Where a piece could be cut wrongly it would show: each piece, alone and between others, as the whole text."""
    tokenizer = TOKENIZERS["tokenizer.model"]
    pieces = [tokenizer.processor.id_to_piece(i).replace("▁", " ") for i in range(3 + 256, 1000)]
    texts = [before + piece + after for piece in pieces for before, after in (("", ""), ("x", "x"), ("\n", " "))]
    assert_same_ids(tokenizer, ENCODERS["tokenizer.model"], texts)


def test_a_table_that_allows_one_unsafe_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: with any one pair of letters wrongly declared safe, ids differ."""
    tokenizer = TOKENIZERS["tokenizer.model"]
    true = unsafe_pairs(tokenizer)
    for a, b in [(b"t", b"h"), (b" ", b"t"), (b" ", b" ")]:
        wrong = true.copy()
        assert wrong[a[0], b[0]]
        wrong[a[0], b[0]] = False
        monkeypatch.setattr(encoder_module, "unsafe_pairs", lambda _, wrong=wrong: wrong)
        with pytest.raises(AssertionError):
            assert_same_ids(tokenizer, Encoder(tokenizer), GOLDEN_TEXTS)


def test_a_tiny_cache_and_tiny_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["tokenizer.model"]
    expected = ENCODERS["tokenizer.model"].encode(pa.array(GOLDEN_TEXTS))
    monkeypatch.setattr(encoder_module, "BLOCK_BYTES", 700)
    for parts, long in [(5, 64), (300, 64), (10_000, 9), (10_000, 64)]:
        monkeypatch.setattr(parts_module, "MAX_PARTS", parts)
        monkeypatch.setattr(parts_module, "LONG_PART", long)
        encoder = Encoder(tokenizer)
        encoded = encoder.encode(pa.array(GOLDEN_TEXTS))
        assert np.array_equal(encoded.tokens, expected.tokens)
        assert np.array_equal(encoded.offsets, expected.offsets)
        assert np.array_equal(encoded.utf8_bytes, expected.utf8_bytes)
        assert len(encoder._parts) <= parts + 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_slices_of_arrow_arrays_of_either_width_are_read_right(kind: pa.DataType) -> None:
    texts = pa.array(["dropped", *GOLDEN_TEXTS[:20], "dropped"], kind).slice(1, 20)
    encoded = ENCODERS["tokenizer.model"].encode(texts)
    again = ENCODERS["tokenizer.model"].encode(pa.array(GOLDEN_TEXTS[:20]))
    assert np.array_equal(encoded.tokens, again.tokens)


def test_no_documents_give_no_tokens() -> None:
    encoded = ENCODERS["tokenizer.model"].encode(pa.array([], pa.string()))
    assert len(encoded.tokens) == 0 and encoded.offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "message"), [("no_bos.model", "no bos piece"), ("make.py", "not a SentencePiece model")]
)
def test_a_model_that_cannot_serve_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tokenizer(GOLDEN / name)


def test_the_wrong_tokenizer_is_refused_by_its_hash() -> None:
    with pytest.raises(ValueError, match="expected 0000"):
        load_tokenizer(TOKENIZER, "0" * 64)


@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS.exists(), reason="the real corpus is not at hand")
@pytest.mark.parametrize("file", sorted(path.name for path in CORPUS.glob("*.parquet")))
def test_every_document_of_the_real_corpus_has_the_ids_of_sentencepiece(file: str) -> None:
    """All of it when named in CORPUS_WHOLE, else one document in twenty: SentencePiece needs 40 s for the whole."""
    import os

    step = 1 if os.environ.get("CORPUS_WHOLE") else 20
    texts = pq.read_table(CORPUS / file, columns=["text"])["text"].combine_chunks()
    encoder = ENCODERS["llama"]
    encoded = encoder.encode(texts)
    for i in range(0, len(texts), step):
        ids = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]]
        text = texts[i].as_py()
        assert np.array_equal(ids, encoder.reference(text)), (file, i)
        assert encoded.utf8_bytes[i] == len(text.encode()) - 2 * text.count("▁")


def test_the_wire_reader_agrees_with_the_library() -> None:
    """Pieces, scores and types read off the file are those that the library reports."""
    for tokenizer in TOKENIZERS.values():
        p = tokenizer.processor
        found = pieces(tokenizer.model)
        assert len(found) == p.vocab_size()
        for i, piece in enumerate(found):
            assert (piece.text, piece.score) == (p.id_to_piece(i), p.get_score(i))
            kinds = piece.type == BYTE, piece.type == CONTROL, piece.type == UNKNOWN
            assert kinds == (p.is_byte(i), p.is_control(i), p.is_unknown(i))
