"""A SentencePiece BPE model as tokenizer.json, with the same ids for every text.

What Transformers converts from the same model differs in two things, and both are settled here:

- SentencePiece puts its dummy space before every text, also before one that begins with a space: a normaliser does so,
  not the pre-tokenizer, which leaves such a text alone.
- `</s>` in a text is text, as it was in training: `split_special_tokens` keeps the control pieces out of the text, and
  no merge makes them. The ids themselves work as ever: `<s>` is put first, generation ends at `</s>`.

SentencePiece merges the neighbours whose piece has the highest score, the leftmost of equals; here a merge has a rank.
The ways to make one piece, equals there, have ranks of their own here; no text has been found in which that shows.

That this is enough is shown for the model at hand, by `differences` on what was written, before an export is named.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor

from shared.durable import write_durably
from shared.manifest import text_of
from shared.tokenizer import SPACE, Tokenizer, has_dummy_prefix

# What tokenizers get wrong; a text each.
HOSTILE = (
    "",
    " ",
    "  ",
    "   ",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    "two  spaces, three   spaces,     five",
    "  leading and trailing  ",
    "<s>",
    "</s>",
    "<unk>",
    "a<s>b</s>c<unk>d",
    "<s> </s> <unk>",
    "</s></s>  </s>",
    "<0x0A>",
    "a <0x0A><0xE2> b",
    "\n",
    "\n\n\n",
    " \n \n",
    "a\nb\r\nc\rd",
    "\t\ttab\tbed \t",
    "\u2581",
    " \u2581 \u2581\u2581a\u2581",
    "nul\0l\0",
    "\x01\x02\x7f\x80\x9f",
    "\u00a0\u2003\u3000no-break\u200bzero\ufeff",
    "café cafe\u0301 \u0301\u0301",
    "naïve Ångström ﬁ ① ㎏",
    "👍🏽👩‍👩‍👧‍👦🇦🇶",
    "中文 日本語 한국어 עברית العربية हिन्दी",
    "\U0001f600\U0010ffff\U000e0001\ud7ff\ue000",
    "1234567890 3.14159 1e-10 0x1F",
    "if (x == 1) { return; } // ---- ==== ****",
    "https://example.org/a?b=c&d=%20#e",
    "The quick brown fox. " * 200,
    "x" * 3000,
    " " * 1000,
)


def write(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    """Put the model itself, tokenizer.json and tokenizer_config.json into `folder`; `length` is that of a sequence."""
    write_durably(folder / "tokenizer.model", tokenizer.model)
    write_durably(folder / "tokenizer.json", json.dumps(tokenizer_json(tokenizer), ensure_ascii=False).encode())
    write_durably(folder / "tokenizer_config.json", text_of(tokenizer_config(tokenizer, length)))


def tokenizer_config(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """tokenizer_config.json: what AutoTokenizer puts around the pipeline."""
    control = _control(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # any other would build a pipeline of its own
        "bos_token": control["bos"],
        "eos_token": control["eos"],
        "unk_token": control["unk"],
        "split_special_tokens": True,  # a literal </s> in a text is text
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: the pipeline of the `tokenizers` library, normaliser to decoder."""
    sp, identity, control = tokenizer.processor, tokenizer.identity, _control(tokenizer)
    prefix = has_dummy_prefix(sp)
    to_pieces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_text = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    bos = {"SpecialToken": {"id": control["bos"], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": sp.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i in sorted({identity.unk_id, identity.bos_id, identity.eos_id})
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), to_pieces],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {
                control["bos"]: {"id": control["bos"], "ids": [identity.bos_id], "tokens": [control["bos"]]}
            },
        },
        "decoder": {"type": "Sequence", "decoders": [to_text, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": control["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(sp.is_byte(i) for i in range(identity.vocab_size)),
            "ignore_merges": False,
            "vocab": {sp.id_to_piece(i): i for i in range(identity.vocab_size)},
            "merges": merges(sp),
        },
    }  # fmt: skip


def merges(sp: SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest score first."""
    scores = {
        sp.id_to_piece(i): sp.get_score(i)
        for i in range(sp.vocab_size())
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))
    }
    ways = [
        (-score, -cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:-cut], piece[-cut:]) for _, cut, piece in sorted(ways)]


class Encoder(Protocol):
    """The part of a Transformers tokenizer that is compared."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


def differences(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text whose ids, or whose decoding, are not those of training; None when there is none."""
    sp, bos = tokenizer.processor, tokenizer.identity.bos_id
    for text in texts:
        want, got = [bos, *sp.encode(text)], encoder.encode(text)
        if got != want:
            return f"the ids of {text[:60]!r} are {got[:12]}, in training {want[:12]}"
        if (back := encoder.decode(got, skip_special_tokens=True)) != sp.decode(want):
            return f"the ids of {text[:60]!r} decode to {back[:60]!r}"
    return None


def proof_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """HOSTILE, each piece, runs of each short one, and random pieces in a row."""
    yield from HOSTILE
    pieces = [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.identity.vocab_size)]
    texts = [piece.replace(SPACE, " ") for piece in pieces]
    yield from texts
    for text in texts:
        if len(text) <= 2:
            yield from (text * n for n in (2, 3, 5, 6, 7, 11, 13, 29))
    random_numbers = random.Random(0)
    for _ in range(5000):
        yield "".join(random_numbers.choices(texts, k=random_numbers.randint(2, 12)))


def _control(tokenizer: Tokenizer) -> dict[str, str]:
    identity = tokenizer.identity
    ids = {"unk": identity.unk_id, "bos": identity.bos_id, "eos": identity.eos_id}
    return {name: tokenizer.processor.id_to_piece(i) for name, i in ids.items()}
