"""The GGUF file holds the model, and an export that does not is refused; in all that needs no llama.cpp."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tokenizer import load_tokenizer
from tests.train.command import Command
from tests.train.dataset import GOLDEN
from tests.train.export.gguf_model import SMALL, source
from train.config import ModelConfig
from train.export import command, gguf_graph, gguf_llama, gguf_proof
from train.export import gguf as writer
from train.export.command import Options
from train.export.source import Source
from train.model import Block, Model


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp has its own tests."""
    monkeypatch.setattr(gguf_llama, "installed", lambda: False)


@pytest.fixture(scope="module")
def small() -> Source:
    torch.set_num_threads(1)
    return source()


@pytest.fixture(scope="module")
def twin() -> Source:
    return source(replace(SMALL, quantization="none"))


@pytest.mark.parametrize("variant", command.VARIANTS["gguf"])
def test_every_variant_holds_the_model(small: Source, tmp_path: Path, variant: str) -> None:
    writer.write(small, tmp_path / "m.gguf", Options(variant))
    proven = writer.prove(small, tmp_path / "m.gguf", Options(variant))
    assert [line.split(":")[0] for line in proven] == ["tensors", "origin", "vocabulary", "graph", "llama.cpp"]
    assert "not installed" in proven[-1]


def test_codes_take_two_bits(small: Source, tmp_path: Path) -> None:
    """TQ2_0: 64 bytes and an fp16 for 256 codes."""
    writer.write(small, tmp_path / "m.gguf", Options("tq2_0"))
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    codes = [t for name, t in tensors.items() if t.tensor_type == gguf.GGMLQuantizationType.TQ2_0]
    assert len(codes) == 7 * SMALL.layers
    assert sum(t.n_bytes for t in codes) == sum(b.weight.numel() for b in small.model.bitlinears()) * 66 // 256


@pytest.mark.parametrize("variant", command.VARIANTS["gguf"])
def test_the_same_checkpoint_gives_the_same_bytes(small: Source, tmp_path: Path, variant: str) -> None:
    for name in "ab":
        writer.write(small, tmp_path / name, Options(variant))
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "ab"}
    assert len(digests) == 1


@pytest.mark.parametrize("variant", ["f16", "f32"])
def test_a_full_precision_twin_is_the_same_graph_without_scales(twin: Source, tmp_path: Path, variant: str) -> None:
    writer.write(twin, tmp_path / "m.gguf", Options(variant))
    writer.prove(twin, tmp_path / "m.gguf", Options(variant))
    assert not any(t.name.endswith(".scale") for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


@settings(deadline=None, max_examples=12)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (6, 1)]),
    head_dim=st.sampled_from([2, 8, 32]),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 70),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    theta=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    seed=st.integers(0, 9),
)
def test_any_shape_passes_through_the_graph_of_llama_cpp(
    tmp_path_factory: pytest.TempPathFactory,
    heads: tuple[int, int],
    head_dim: int,
    layers: int,
    ffn: int,
    eps: float,
    theta: float,
    seed: int,
) -> None:
    shape = ModelConfig(
        hidden=heads[0] * head_dim, layers=layers, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, ffn=ffn,
        norm_eps=eps, rope_theta=theta, init_std=0.3,
    )  # fmt: skip
    drawn, out = source(shape, seed=seed), tmp_path_factory.mktemp("any") / "m.gguf"
    for variant in ("f16", "f32"):
        writer.write(drawn, out, Options(variant))
        writer.prove(drawn, out, Options(variant))


# Each fault is planted where it could be made: in the writer's matrices, in its fields, or in llama.cpp's graph.


def of_matrices(change: Callable[[dict[str, Any], Block], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant a fault in what `matrices` yields: `change` gets {name: [values, scale]} of a layer, to alter."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = writer.matrices

        def matrices(model: Model) -> Iterator[tuple[str, Any, Any]]:
            for i, block in enumerate(model.layers):
                assert isinstance(block, Block)
                at = f"blk.{i}."
                found = {name: [values, scale] for name, values, scale in real(model)}
                layer = {name.removeprefix(at): each for name, each in found.items() if name.startswith(at)}
                change(layer, block)
                yield from ((at + name, values, scale) for name, (values, scale) in layer.items())

        monkeypatch.setattr(writer, "matrices", matrices)

    return plant


def of_call(name: str, *arguments: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant a fault in one call of the GGUF writer: other arguments."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(gguf.GGUFWriter, name)
        monkeypatch.setattr(gguf.GGUFWriter, name, lambda self, *_: real(self, *arguments))

    return plant


def of_tensors(change: Callable[[list[Any]], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant a fault in the list of tensors."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = writer.tensors

        def tensors(source: Source, variant: str) -> list[Any]:
            found = list(real(source, variant))
            change(found)
            return found

        monkeypatch.setattr(writer, "tensors", tensors)

    return plant


def in_graph(name: str, function: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(gguf_graph, name, function)


def swapped(a: str, b: str) -> Callable[[pytest.MonkeyPatch], None]:
    return of_matrices(lambda found, block: found.update({a: found[b], b: found[a]}))


def latent(found: dict[str, Any], block: Block) -> None:
    found["attn_output"] = [block.attention.output.weight, None]


def inverted(found: dict[str, Any], block: Block) -> None:
    found["ffn_down"][1] = 1 / found["ffn_down"][1]


def one_code(found: dict[str, Any], block: Block) -> None:
    codes = found["attn_k"][0].clone()
    codes[3, 5] = 1 - codes[3, 5].abs()
    found["attn_k"][0] = codes


def one_bit_of_a_scale(found: dict[str, Any], block: Block) -> None:
    found["ffn_up"][1] = torch.nextafter(found["ffn_up"][1], torch.tensor(9.0))


def no_scale(found: dict[str, Any], block: Block) -> None:
    found["attn_v"][1] = None


def interleaved(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """LLAMA_ROPE_TYPE_NORM: neighbours instead of halves."""
    cos, sin = (angle.double()[:, None] for angle in angles)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class ReluSquared:
    @staticmethod
    def silu(x: torch.Tensor) -> torch.Tensor:
        return x.relu().square()


GRAPH = "differ from ours"
FAULTS = {
    "wrong epsilon": (of_call("add_layer_norm_rms_eps", 1e-6), GRAPH),
    "wrong rope base": (of_call("add_rope_freq_base", 10_001.0), GRAPH),
    "gate and up swapped": (swapped("ffn_gate", "ffn_up"), GRAPH),
    "k and v swapped": (swapped("attn_k", "attn_v"), GRAPH),
    "inverted scale": (of_matrices(inverted), GRAPH),
    "scale left out": (of_matrices(no_scale), GRAPH),
    "one bit of a scale": (of_matrices(one_bit_of_a_scale), GRAPH),
    "one code": (of_matrices(one_code), GRAPH),
    "a tensor more": (of_tensors(lambda t: t.append(replace(t[0], name="output.weight"))), "no tensor of llama.cpp"),
    "a tensor less": (of_tensors(lambda t: t.pop()), "no tensor output_norm.weight"),
    "relu² for silu": (in_graph("F", ReluSquared()), GRAPH),
    "rope of neighbours": (in_graph("neox", interleaved), GRAPH),
    "wrong end of text": (of_call("add_eos_token_id", 3), "tokenizer.ggml.eos_token_id"),
    "no beginning of text": (of_call("add_add_bos_token", False), "tokenizer.ggml.add_bos_token"),
    "no space before": (of_call("add_add_space_prefix", False), "tokenizer.ggml.add_space_prefix"),
    "scores of nothing": (of_call("add_token_scores", [0.0] * 1000), "tokenizer.ggml.scores"),
    "types of nothing": (of_call("add_token_types", [1] * 1000), "tokenizer.ggml.token_type"),
    "wrong length": (of_call("add_context_length", 2048), "bitnet.context_length"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused(small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """What the writer and the proof share is planted in both: the graph alone must find it."""
    plant, said = FAULTS[fault]
    plant(monkeypatch)
    monkeypatch.setattr(gguf_proof, "tensors", writer.tensors)
    writer.write(small, tmp_path / "m.gguf", Options("f32"))
    with pytest.raises(ValueError, match=said):
        writer.prove(small, tmp_path / "m.gguf", Options("f32"))


@pytest.mark.parametrize("variant", command.VARIANTS["gguf"])
def test_latent_weights_are_refused(
    small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    of_matrices(latent)(monkeypatch)
    writer.write(small, tmp_path / "m.gguf", Options(variant))
    monkeypatch.undo()
    monkeypatch.setattr(gguf_llama, "installed", lambda: False)
    with pytest.raises(ValueError, match=r"attn_output\.weight does not hold"):
        writer.prove(small, tmp_path / "m.gguf", Options(variant))


def test_a_quantiser_that_rounds_codes_is_refused(
    small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf.quantize
    tq2_0 = gguf.GGMLQuantizationType.TQ2_0
    monkeypatch.setattr(
        gguf, "quantize", lambda values, type: real(values * np.float32(0.999 if type == tq2_0 else 1), type)
    )
    writer.write(small, tmp_path / "m.gguf", Options("tq2_0"))
    with pytest.raises(ValueError, match="does not hold the model's values"):
        writer.prove(small, tmp_path / "m.gguf", Options("tq2_0"))


def test_another_variant_or_origin_is_refused(small: Source, tmp_path: Path) -> None:
    writer.write(small, tmp_path / "m.gguf", Options("f16"))
    with pytest.raises(ValueError, match=r"token_embd\.weight is not there as Q8_0"):
        writer.prove(small, tmp_path / "m.gguf", Options("tq2_0"))
    other = replace(small, facts=replace(small.facts, data_id="cd" * 32))
    for wrong, said in ((replace(small, step=8), "step"), (other, "data_id")):
        with pytest.raises(ValueError, match=f"bitnet_fineweb_edu.{said}"):
            writer.prove(wrong, tmp_path / "m.gguf", Options("f16"))


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_changed_byte_of_a_tensor_is_refused(
    small: Source, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = tmp_path_factory.mktemp("byte") / "m.gguf"
    writer.write(small, out, Options("tq2_0"))
    tensor = data.draw(st.sampled_from(gguf.GGUFReader(out).tensors))
    content = bytearray(out.read_bytes())
    place = tensor.data_offset + data.draw(st.integers(0, tensor.n_bytes - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    out.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not hold|differ from ours"), np.errstate(all="ignore"):
        writer.prove(small, out, Options("tq2_0"))


@pytest.mark.parametrize(
    ("change", "variant", "said"),
    [
        ({"hidden": 192, "heads": 3, "kv_heads": 1}, "tq2_0", "model.hidden is 192"),
        ({"ffn": 384}, "tq2_0", "model.ffn is 384"),
        ({"quantization": "none"}, "tq2_0", "full-precision twin"),
    ],
)
def test_what_the_blocks_cannot_hold_is_refused_with_the_way_out(
    tmp_path: Path, change: dict[str, Any], variant: str, said: str
) -> None:
    with pytest.raises(ValueError, match=f"{said}.*--variant f16"):
        writer.write(source(replace(SMALL, **change)), tmp_path / "m.gguf", Options(variant))


@pytest.mark.parametrize("model", ["unigram", "user_symbols", "squeeze"])
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp would encode texts in another way"):
        writer.write(source(tokenizer=load_tokenizer(GOLDEN / f"{model}.model")), tmp_path / "m.gguf", Options("f16"))


@pytest.fixture(scope="module")
def run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in progress."""
    path = tmp_path_factory.mktemp("runs") / "one"
    assert train.run(data, path, "--steps", "5").code == 0
    return path


def test_the_command_writes_a_proven_file_and_says_what_holds(train: Command, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "one.gguf"
    done = train("export", run, "--format", "gguf", "--variant", "f16", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("tensors: ")
    fields = gguf.GGUFReader(out).fields
    assert fields["bitnet_fineweb_edu.step"].contents() == "5"
    assert [path.name for path in out.parent.iterdir()] == ["one.gguf"]


def test_the_default_variant_says_when_it_does_not_fit(train: Command, run: Path, tmp_path: Path) -> None:
    done = train("export", run, "--format", "gguf", "--out", tmp_path / "one.gguf")
    assert done.code == 1
    assert done.err.startswith("error: one: model.hidden is 16 and TQ2_0") and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_proof_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_call("add_layer_norm_rms_eps", 1e-6)(monkeypatch)
    with pytest.raises(ValueError, match=GRAPH):
        command.export(run, "gguf", tmp_path / "one.gguf", "f16", print)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_disk_is_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> None:
        self.fout[0].write(b"half")
        raise OSError("4096 requested and 0 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="requested and 0 written"):
        command.export(run, "gguf", tmp_path / "one.gguf", "f16", print)
    assert list(tmp_path.iterdir()) == []
