"""What llama.cpp itself says of the files. Run by `make test-gguf`, which builds llama-cpp-python first."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tokenizer import Tokenizer, load_tokenizer
from tests.train.command import ROOT
from tests.train.export.gguf_model import SMALL, TOKENIZER, source
from train.config import ModelConfig
from train.export import gguf_llama, gguf_proof
from train.export.command import VARIANTS, Options
from train.export.divergence import mean_divergence
from train.export.gguf import prove, write
from train.export.source import Source, open_source
from train.model import Model
from train.samples import encode

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-gguf builds it")

LLAMA_2 = ROOT.parent / "shared" / "tokenizer" / "tokenizer.model"
TOKENIZERS = [TOKENIZER, pytest.param(LLAMA_2, marks=pytest.mark.corpus)]
FRAGMENTS = ["<s>", "</s>", "<unk>", "<0x0A>", "\n", "\r\n", "\t", " ", "  ", "▁", "\0", "é", "字", "the", "12", "=="]


@pytest.fixture(scope="module")
def small() -> Source:
    torch.set_num_threads(1)
    return source()


@pytest.fixture(scope="module")
def tokens(small: Source) -> list[list[int]]:
    return [document[:64] for document in gguf_proof.documents(small.tokenizer)]


def asked(made: Source, variant: str, tokens: list[list[int]], folder: Path) -> torch.Tensor:
    """llama.cpp's logits."""
    write(made, folder / f"{variant}.gguf", Options(variant))
    return torch.from_numpy(gguf_llama.ask(folder / f"{variant}.gguf", tokens, [])[0]).double()


@pytest.mark.parametrize("variant", VARIANTS["gguf"])
def test_llama_cpp_says_what_the_model_says(small: Source, tmp_path: Path, variant: str) -> None:
    write(small, tmp_path / "m.gguf", Options(variant))
    proven = prove(small, tmp_path / "m.gguf", Options(variant))
    assert sum(line.startswith("llama.cpp: ") for line in proven) == 4


@pytest.mark.parametrize("variant", ["f16", "f32"])
def test_a_full_precision_twin_too(tmp_path: Path, variant: str) -> None:
    twin = source(replace(SMALL, quantization="none"))
    write(twin, tmp_path / "m.gguf", Options(variant))
    assert sum(line.startswith("llama.cpp: ") for line in prove(twin, tmp_path / "m.gguf", Options(variant))) == 4


def test_the_model_of_the_95m_preset_too(tmp_path: Path) -> None:
    if not LLAMA_2.exists():
        pytest.skip("needs a vocabulary of 32,000: ../shared/tokenizer")
    large = source(ModelConfig(), load_tokenizer(LLAMA_2))
    write(large, tmp_path / "m.gguf", Options("tq2_0"))
    assert len(prove(large, tmp_path / "m.gguf", Options("tq2_0"))) == 8


def test_each_point_asked_of_llama_cpp_is_refused_when_it_fails(
    small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is right, and so passes what needs no llama.cpp; llama.cpp gives something else."""
    write(small, tmp_path / "m.gguf", Options("tq2_0"))
    real_ask, real_eps = gguf_llama.ask, gguf.GGUFWriter.add_layer_norm_rms_eps

    def of_another_model(file: Path, *asked: Any) -> Any:
        write(source(seed=5), tmp_path / "other.gguf", Options("tq2_0"))
        return real_ask(tmp_path / "other.gguf" if file.name == "m.gguf" else file, *asked)

    def with_bos(*asked: Any) -> Any:
        logits, ids = real_ask(*asked)
        return logits, [[1, *found] for found in ids]

    for owner, name, fault, said in (
        (gguf.GGUFWriter, "add_layer_norm_rms_eps", lambda self, eps: real_eps(self, 1e-6), "logits of the F32 form"),
        (gguf_llama, "ask", of_another_model, "nats from the model's"),
        (gguf_llama, "ask", with_bos, r"llama\.cpp's ids of"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=said):
            patch.setattr(owner, name, fault)
            prove(small, tmp_path / "m.gguf", Options("tq2_0"))


# What a wrong export would be: our model with one thing changed, in activations as trained.


def with_(made: Source, **config: object) -> Model:
    model = Model(replace(made.config, **config))  # type: ignore[arg-type]
    model.load_state_dict(made.model.state_dict())
    model.requantize()
    return model


def swapped(made: Source) -> Model:
    model = with_(made)
    with torch.no_grad():
        for block in model.layers:
            block.ffn.gate_up.weight.copy_(torch.cat(block.ffn.gate_up.weight.chunk(2)[::-1]))
    model.requantize()
    return model


def inverted(made: Source) -> Model:
    model = with_(made)
    for layer in model.bitlinears():
        layer.scale = 1 / layer.scale
    return model


WRONG = {
    "gate and up swapped": swapped,
    "inverted scales": inverted,
    "latent weights": lambda made: with_(made, quantization="none"),
    "relu² for silu": with_,
    "epsilon of 1e-3": lambda made: with_(made, norm_eps=1e-3),
}


@contextmanager
def relu_squared(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        if wanted:
            patch.setattr(F, "silu", lambda x: x.relu().square())
        yield


@pytest.mark.parametrize("wrong", WRONG)
def test_tq2_0_is_nearer_to_the_model_than_to_any_wrong_one(
    small: Source, tokens: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    found = asked(small, "tq2_0", tokens, tmp_path)
    with relu_squared(monkeypatch, wrong == "relu² for silu"):
        other = gguf_proof.logits_of(WRONG[wrong](small), tokens)
    right = mean_divergence(gguf_proof.logits_of(small.model, tokens), found)
    assert right < gguf_proof.KL
    assert mean_divergence(other, found) > 2 * right
    if wrong != "epsilon of 1e-3":  # which int8 activations nearly hide
        assert mean_divergence(other, found) > gguf_proof.KL


def test_the_f32_form_tells_an_epsilon_of_a_tenth(small: Source, tokens: list[list[int]], tmp_path: Path) -> None:
    found = asked(small, "f32", tokens, tmp_path)
    errors = []
    for eps in (1e-5, 1e-6):
        ours = gguf_proof.logits_of(
            gguf_proof.as_stored(replace(small, model=with_(small, norm_eps=eps)), "f32"), tokens
        )
        errors.append(((found - ours).abs().max() / ours.abs().max()).item())
    assert errors[0] <= gguf_proof.LLAMA < errors[1]


@pytest.mark.parametrize("path", TOKENIZERS)
@settings(deadline=None, max_examples=10)
@given(texts=st.lists(st.lists(st.text() | st.sampled_from(FRAGMENTS)).map("".join), min_size=30, max_size=300))
def test_llama_cpp_has_the_ids_of_sentencepiece(
    tmp_path_factory: pytest.TempPathFactory, path: Path, texts: list[str]
) -> None:
    if not path.exists():
        pytest.skip("needs the real tokenizer in ../shared")
    tokenizer, out = load_tokenizer(path), tmp_path_factory.mktemp("ids") / "m.gguf"
    narrow = ModelConfig(hidden=32, layers=1, heads=1, kv_heads=1, head_dim=32, ffn=32)
    write(source(narrow, tokenizer), out, Options("f32"))
    _, found = gguf_llama.ask(out, [[1]], texts)
    assert found == [tokenizer.processor.encode(text) for text in texts]


def test_where_llama_cpp_makes_a_token_of_text_the_proof_says_so(tmp_path: Path) -> None:
    """With the pieces `</` and `s>` in a vocabulary llama.cpp merges them to the control piece, SentencePiece not."""

    def piece(text: bytes, score: float) -> bytes:  # of a ModelProto, which may be put together end to end
        entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        return b"\x0a" + bytes([len(entry)]) + entry

    path = tmp_path / "joined.model"
    path.write_bytes(TOKENIZER.read_bytes() + piece(b"</", -1.0) + piece(b">", -3.0) + piece(b"s>", -2.0))
    tokenizer: Tokenizer = load_tokenizer(path)
    made = source(tokenizer=tokenizer)
    write(made, tmp_path / "m.gguf", Options("f16"))
    _, found = gguf_llama.ask(tmp_path / "m.gguf", [[1]], ["a</s>"])
    eos = tokenizer.identity.eos_id
    assert eos in found[0] and eos not in tokenizer.processor.encode("a</s>")
    assert "</s>" in prove(made, tmp_path / "m.gguf", Options("f16"))[-1]


def test_a_file_at_which_llama_cpp_aborts_is_one_line(small: Source, tmp_path: Path) -> None:
    write(small, tmp_path / "m.gguf", Options("tq2_0"))
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(ValueError, match=r"llama\.cpp does not take this file"):
        gguf_llama.ask(tmp_path / "m.gguf", [[1]], [])


def test_llama_cpp_goes_on_with_a_text_as_our_model_does(small: Source, tmp_path: Path) -> None:
    from llama_cpp import Llama

    write(small, tmp_path / "m.gguf", Options("f32"))
    llama = Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    prompt = llama.tokenize(b"The capital", add_bos=True)
    assert prompt == encode(small.tokenizer, "The capital")
    written = []
    for token in llama.generate(prompt, temp=0.0):
        written.append(token)
        if len(written) == 20:
            break
    ours, model = list(prompt), gguf_proof.as_stored(small, "f32")
    for _ in range(20):
        ours.append(int(gguf_proof.logits_of(model, [ours])[-1].argmax()))
    assert written == ours[len(prompt) :]


@pytest.mark.corpus
def test_a_trained_run_is_proven(tmp_path: Path) -> None:
    run = ROOT / "runs" / "tiny-edu"
    if not run.exists():
        pytest.skip("needs a run of the tiny preset at runs/tiny-edu")
    trained = open_source(run, print)
    write(trained, tmp_path / "m.gguf", Options("tq2_0"))
    assert len(prove(trained, tmp_path / "m.gguf", Options("tq2_0"))) == 8
