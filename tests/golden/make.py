"""Make the golden source and the small SentencePiece models beside this file: `python tests/golden/make.py [FOLDER]`.

    source/prose.jsonl    250 documents from a small grammar: id and url given
    source/hostile.jsonl  the texts that tokenisers get wrong, empty ones, and copies of whole documents
    source/lines.txt      a document a line: no id, no url
    tokenizer.model       a BPE of 1,000 pieces with LLaMA-2's options
    unigram.model         another algorithm: must be encoded whole
    user_symbols.model    a BPE with user-defined symbols, which match before any merge: must be encoded whole
    squeeze.model         a BPE that drops extra white space, which is another normalisation: must be encoded whole
    no_bos.model          without <s>: must be refused

All text is ours. What this writes under source/ is fixed to the byte, and a test holds it to what is committed; the
models are what SentencePiece 0.2.3 made of it and are committed as they are.
"""

import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

DOCUMENTS = 250
COPIES = 12  # whole documents that stand twice, for the holdout


def words(text: str) -> list[str]:
    return text.split()


THINGS = words("""river valley forest mountain desert island glacier volcano harbour village city bridge canal mill farm
orchard garden meadow library school museum theatre market workshop factory railway station engine wheel lever pulley
magnet lens telescope microscope thermometer barometer compass clock calendar map chart table graph number fraction
equation triangle circle cube angle pattern sequence proof theorem law treaty king queen parliament senate citizen
farmer sailor
merchant teacher scientist engineer painter composer poet historian doctor nurse plant leaf root seed flower tree moss
fungus bacterium virus cell membrane protein enzyme muscle bone heart lung brain nerve eye insect beetle butterfly
spider fish salmon whale bird swallow owl horse sheep wolf planet moon star galaxy comet orbit atom molecule crystal
metal copper iron salt acid oxygen carbon nitrogen water ice steam cloud storm wind current wave tide light shadow
sound echo heat energy force pressure friction gravity language word letter sentence story song dance""")
QUALITIES = words("""ancient modern large small deep shallow bright dark heavy light warm cold dry wet early late
northern southern simple complex common rare strong weak steady sudden natural artificial public private useful
dangerous famous
forgotten careful patient curious quiet regular uneven transparent flexible""")
ACTIONS = words("""shapes carries protects describes measures explains follows changes divides connects absorbs reflects
produces stores releases supports limits records compares predicts attracts surrounds replaces resembles""")
PLACES = """near the coast|in the upper valley|under the surface|above the clouds|during the winter|in early spring|
after the harvest|between two rivers|along the old road|inside every cell|on the far side of the moon|at sea level|
in the nineteenth century|throughout Europe|in most schools|across the plain""".replace("\n", "").split("|")
FORMS = [
    "The {q} {t} {a} the {t}.",
    "A {t} {a} every {q} {t} {p}.",
    "Students often ask why a {t} {a} the {q} {t}.",
    "In {y}, a {q} {t} was found {p}, and it {a} the {t} to this day.",
    "About {n} percent of each {t} is {q}; the rest {a} its {t}.",
    "“The {t},” wrote one {t}, “{a} what the {q} {t} cannot.”",
    "It isn't the {t} that {a} the {t}, but the {q} {t} {p}!",
    "How is the {t} measured? A {q} {t} {a} it {p} (see table {n}).",
    "First the {t} becomes {q}, then it {a} the {t}, and finally the {t} rests {p}.",
    "The {t}'s length is {n}.{n} m, its mass {n},{y} kg, and its {t} is {q}.",
]
NATURAL = [  # enough of other scripts that some of their letters get pieces of their own
    "El niño leyó la canción del año pasado; ¿quién sabe más?",
    "Über den Wäldern fließt der Nebel, größer als früher.",
    "L'été, la forêt s'éveille où naît le fleuve; ça va déjà mieux.",
    "Школа стоит у реки, и дети читают старую книгу о звёздах.",
    "Ο ποταμός ρέει δίπλα στο σχολείο και τα παιδιά διαβάζουν.",
]
SCRIPTS = [  # letters that the small models have no pieces for: bytes
    "川は谷を流れ、子どもたちは本を読む。カタカナ",
    "河流穿过山谷，孩子们在读书。",
    "강은 골짜기를 흐르고 아이들은 책을 읽는다.",
    "النهر يجري في الوادي والأطفال يقرؤون كتابًا.",
    "הנהר זורם בעמק והילדים קוראים ספר.",
    "नदी घाटी में बहती है और बच्चे किताब पढ़ते हैं।",
    "แม่น้ำไหลผ่านหุบเขา เด็กๆ อ่านหนังสือ",
    "வெள்ளம் ஆறு பள்ளத்தாக்கில் ஓடுகிறது.",
    "মাছ নদীতে থাকে।",
    "გოგონა კითხულობს წიგნს.",
    "Աղջիկը գիրք է կարդում։",
    "ወንዙ በሸለቆው ውስጥ ይፈሳል።",
    "ᚠᚢᚦᚨᚱᚲ ᛏᚺᛖ ᚱᛁᚹᛖᚱ",
    "𐌰𐌲𐌾𐌰 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝟘𝟙𝟚 🀄",
]
HOSTILE = [
    "</s>",
    "<s>",
    "a literal <s> and </s> and <unk> and <0x0A> and <pad> stay text",
    "</s></s> <s><s>x</s>\n<s>\n",
    "<0x41><0xE2><0x96><0x81>",
    "Windows\r\nline\r\nends;\r\n\r\n",
    "old Mac\rline\rends\r",
    "\ttab first,\ttab\t\tinside,\ttab last\t",
    " one space first",
    "   three spaces first",
    "spaces last   ",
    "a  b   c    d     e      f       g        h",
    " ",
    "      ",
    " " * 100,
    "\n",
    "\n\n\n \n  \n",
    "\t",
    "▁",
    "▁▁▁",
    "a▁b ▁c▁ d ▁ e",
    "▁the ▁river",
    "NUL \x00 in the middle",
    "\x00",
    "control \x01\x02\x07\x08\x0b\x0c\x1b\x1f\x7f\x85 characters",
    "\ufeffa byte-order mark first",
    "a byte-order mark \ufeff inside",
    "combining: e\u0301 a\u0308\u0304 n\u0303 \u0301alone Z̸̢̛͔a̵̗͐l̶̰̈g̷̣̕ȍ̶͜",
    "composed: é ǟ ñ Å \u212b \u2126",
    "emoji: 😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭🇺🇳 ❤️ 1️⃣ 🫠",
    "zero width: a\u200bb\u200cc\u200dd\u2060e",
    "no-break\u00a0space thin\u2009space ideographic\u3000space line\u2028separator paragraph\u2029separator",
    "direction: \u202eright to left\u202c \u2066isolate\u2069",
    "private use \ue000\uf8ff, noncharacters \ufffe\uffff\U0010ffff, replacement \ufffd",
    "digits 0123456789 3.14159 1,000,000 2024-01-31 007 1e-5 ٠١٢٣ ①②③ Ⅻ ½",
    "punctuation !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ... --- === ///",
    "    if (river > 0) {\r\n        flow(river, valley);\r\n    }\r\n",
    "def flow(river):\n\treturn [drop for drop in river if drop]\n",
    "CamelCaseWords snake_case_words kebab-case-words MiXeD123cAsE",
    "https://example.org/path?query=river&page=2#valley someone@example.org",
    "ﬁ ligature, ＦＵＬＬ ｗｉｄｔｈ, ㎞, ™, ²",
    "x",
    "é",
    "字",
    "😀",
    "river" * 4000,  # 20,000 letters without a space
    "川" * 3000,
    "-" * 5000 + "=" * 5000,
]


def choose(chance: random.Random, items: list[str]) -> str:
    return items[int(chance.random() * len(items))]  # random() alone is promised to be the same in every Python


def sentence(chance: random.Random) -> str:
    text = choose(chance, FORMS)
    while "{" in text:
        before, _, rest = text.partition("{")
        kind, after = rest[0], rest[2:]
        number = str(1 + int(chance.random() * 99))
        words = {"t": THINGS, "q": QUALITIES, "a": ACTIONS, "p": PLACES, "n": [number], "y": [f"1{number:0>2}7"]}[kind]
        text = before + choose(chance, words) + after
    return text


def document(chance: random.Random) -> str:
    """A heading, paragraphs, now and then a list, indented code with \\r\\n, or a line in another language."""
    parts = [f"The {choose(chance, QUALITIES)} {choose(chance, THINGS)}".title()]
    for _ in range(1 + int(chance.random() * 4)):
        parts.append(" ".join(sentence(chance) for _ in range(1 + int(chance.random() * 6))))
    if chance.random() < 0.2:
        parts.append("\n".join(f"{i}. {sentence(chance)}" for i in range(1, 4)))
    if chance.random() < 0.4:
        name = choose(chance, THINGS)
        code = [f"for ({name} = 0; {name} < 10; {name}++) {{", f"    use({name});", f"        // {name}", "}", ""]
        parts.append("\r\n".join(code))
    if chance.random() < 0.2:
        parts.append(choose(chance, NATURAL))
    return "\n\n".join(parts)


def prose() -> list[str]:
    chance = random.Random(20240601)
    return [document(chance) for _ in range(DOCUMENTS)]


def hostile(documents: list[str]) -> Iterator[dict[str, object]]:
    """The rows of hostile.jsonl: texts alone, some without id or url, and among them nulls, empty texts and copies."""
    for i, text in enumerate([*HOSTILE, *SCRIPTS, *NATURAL]):
        row: dict[str, object] = {"text": text, "id": f"hostile-{i}", "url": f"https://example.org/h?i={i}&s=é"}
        if i % 5 == 3:
            del row["id"]
        if i % 7 == 2:
            del row["url"]
        yield row
        if i % 20 == 7:
            yield {"text": "", "id": "empty"}
        if i % 20 == 11:
            yield {"text": None, "id": "null"}
    for i in range(COPIES):
        yield {"id": f"copy-{i}", "text": documents[i * 17], "extra": [1, 2.5, None], "url": None}
    for text in HOSTILE[:6]:
        yield {"text": text, "id": "again"}


def lines(documents: list[str]) -> Iterator[str]:
    """The lines of lines.txt: what a line cannot hold is left out, what looks like a line end to Python is not."""
    chance = random.Random(7)
    for i in range(120):
        yield sentence(chance)
        if i % 10 == 0:
            yield ""
    yield from (text for text in [*HOSTILE[:36], *SCRIPTS] if "\n" not in text and "\r" not in text)
    yield documents[0].replace("\n", " ").replace("\r", " ")
    yield sentence(chance) + " The last line has no line end."


def write_source(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    documents = prose()
    rows = [
        json.dumps({"text": text, "id": f"prose-{i:03d}", "url": f"https://example.org/{i}"}, ensure_ascii=i % 2 == 0)
        for i, text in enumerate(documents)
    ]
    (folder / "prose.jsonl").write_bytes("".join(row + "\n" for row in rows).encode())
    rows = [json.dumps(row, ensure_ascii=i % 3 == 0) for i, row in enumerate(hostile(documents))]
    (folder / "hostile.jsonl").write_bytes("\n".join(rows).encode())  # no line end at the end
    (folder / "lines.txt").write_bytes("\n".join(lines(documents)).encode())


def train(path: Path, documents: list[str], **options: object) -> None:
    """Train a model as LLaMA's was, line by line, but for `options`.

    The iterator interface drops a \\r at the end of a line, which LLaMA's training kept: a space after it saves it.
    """
    lines = [line for text in documents for line in text.split("\n")]
    out = io.BytesIO()
    llama: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 1000,
        "byte_fallback": True,
        "character_coverage": 0.99995,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.replace("\r", "\r ") for line in lines]),
        model_writer=out,
        num_threads=1,
        minloglevel=2,
        **{**llama, **options},
    )
    path.write_bytes(out.getvalue())


def main(folder: Path) -> None:
    write_source(folder / "source")
    documents = prose()
    train(folder / "tokenizer.model", documents)
    train(folder / "unigram.model", documents, model_type="unigram", vocab_size=500)
    train(folder / "user_symbols.model", documents, vocab_size=500, user_defined_symbols=["river", "e t", "\t\t", ">x"])
    train(folder / "squeeze.model", documents, vocab_size=500, remove_extra_whitespaces=True)
    train(folder / "no_bos.model", documents, vocab_size=400, bos_id=-1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
