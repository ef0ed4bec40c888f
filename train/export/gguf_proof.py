"""Whether a GGUF file says what our model says. What needs no llama.cpp is checked always:

1. The tensors: codes, scales and norms are bitwise ours; what a variant rounds is what the reference quantiser gives.
2. The vocabulary: pieces, scores, types and special ids are those of the SentencePiece model.
3. The arithmetic: llama.cpp's graph, computed in fp64 from the file, has our logits to GRAPH. Activations are not
   rounded on either side: they are no part of a file.

And where llama_cpp can be imported, in llama.cpp itself:

4. The F32 form, whose activations llama.cpp does not round, has our logits to LLAMA of the largest one.
5. The file at hand: the mean KL divergence from the model as trained is under KL, or under four times what our own
   rounding of activations makes, if that is more. Only structure shows here, and shows by far (swapped gate and up:
   0.09 nats, where 2e-4 to 6e-4 are usual); an epsilon of 1e-6 for 1e-5 does not: 1, 3 and 4 see it.
6. Its tokenizer gives SentencePiece's ids, also of hostile texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import Keys
from torch import Tensor

from shared.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN
from shared.tokenizer import Tokenizer, has_dummy_prefix
from train.bitlinear import BitLinear
from train.export import gguf_llama
from train.export.command import Options
from train.export.divergence import mean_divergence
from train.export.gguf import VARIANTS, origin, tensors, write
from train.export.gguf_graph import Graph
from train.export.source import Source
from train.export.tokenizer import proof_texts
from train.model import Model
from train.samples import PROMPTS, encode

GRAPH = 1e-10  # largest difference of logits in fp64
LLAMA = 1e-5  # largest difference in llama.cpp's fp32, in units of the largest logit
KL = 1e-2  # nats, mean over positions
PROSE = (
    "Plants make their food from light, water and air. In the spring of 1787 a farmer wrote that his fields had never "
    "been so dry: the river, which fed three villages, was down to a third of its width. What could be done? Some dug "
    "wells; others moved their herds to the hills, where it still rained. “We waited,” he said, “and we learned.”"
)


def prove(source: Source, out: Path, variant: str) -> list[str]:
    """What holds of the file `out`, a line each. ValueError names the first thing that does not."""
    graph = Graph(out)
    tokens = [document[: source.facts.sequence_length] for document in documents(source.tokenizer)]
    lines = [
        same_tensors(source, graph, variant),
        same_fields(source, graph),
        same_vocabulary(source.tokenizer, graph),
        same_graph(source, graph, variant, tokens),
    ]
    if not gguf_llama.installed():
        return [*lines, "llama.cpp: not asked, for llama-cpp-python is not installed (pip install '.[llama]')"]
    beware = made_of_text(source.tokenizer)
    plain = [text for text in proof_texts(source.tokenizer) if not any(name in text for name in beware)]
    logits, found = gguf_llama.ask(out, tokens, plain)
    unrounded = logits_of(as_stored(source, "f32"), tokens)
    return [
        *lines,
        f"llama.cpp: llama-cpp-python {version('llama-cpp-python')} takes the file",
        same_f32_form(source, tokens, unrounded),
        near(torch.from_numpy(logits), logits_of(source.model, tokens), unrounded),
        same_ids(source.tokenizer, plain, found) + (f", but {' '.join(beware)} are made of text" if beware else ""),
    ]


def documents(tokenizer: Tokenizer) -> list[list[int]]:
    """Two sequences as in training: short documents one behind the other, and a longer one."""
    return [[i for text in PROMPTS for i in encode(tokenizer, text)], encode(tokenizer, PROSE)]


def same_tensors(source: Source, graph: Graph, variant: str) -> str:
    """1: every tensor, bit by bit."""
    expected = list(tensors(source, variant))
    for tensor in expected:
        if graph.types.get(tensor.name) != tensor.type:
            raise ValueError(f"the file's {tensor.name} is not there as {tensor.type.name}")
        exact = tensor.type == Type.F32 or (source.quantized and tensor.name != "token_embd.weight")
        want = tensor.values if exact else rounded(tensor.values, tensor.type)
        if not np.array_equal(graph.arrays[tensor.name], want):
            raise ValueError(f"the file's {tensor.name} does not hold the model's values")
    stored = VARIANTS[variant]
    return (
        f"tensors: {len(expected)} as the model has them, matrices as {stored.matrices.name}, "
        f"embeddings as {stored.embedding.name}"
    )


def same_fields(source: Source, graph: Graph) -> str:
    """What llama.cpp reads beside the graph's own parameters, and where the model comes from."""
    c = source.config
    sizes = {
        Keys.LLM.CONTEXT_LENGTH: source.facts.sequence_length,
        Keys.LLM.EMBEDDING_LENGTH: c.hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: c.ffn,
        Keys.LLM.VOCAB_SIZE: c.vocab_size,
    }
    require_fields(graph, {name.format(arch="bitnet"): value for name, value in sizes.items()})
    require_fields(graph, origin(source))
    return f"origin: data set {source.facts.data_id}, step {source.step}"


def same_vocabulary(tokenizer: Tokenizer, graph: Graph) -> str:
    """2: what the SentencePiece library says of each piece; the file was written from the model's bytes."""
    sp, identity = tokenizer.processor, tokenizer.identity
    ids = range(identity.vocab_size)

    def type_of(i: int) -> int:
        return CONTROL if sp.is_control(i) else UNKNOWN if sp.is_unknown(i) else BYTE if sp.is_byte(i) else NORMAL

    expected = {
        Keys.Tokenizer.MODEL: "llama",
        Keys.Tokenizer.LIST: [sp.id_to_piece(i) for i in ids],
        Keys.Tokenizer.SCORES: [sp.get_score(i) for i in ids],
        Keys.Tokenizer.TOKEN_TYPE: [type_of(i) for i in ids],
        Keys.Tokenizer.BOS_ID: identity.bos_id,
        Keys.Tokenizer.EOS_ID: identity.eos_id,
        Keys.Tokenizer.UNK_ID: identity.unk_id,
        Keys.Tokenizer.ADD_BOS: True,
        Keys.Tokenizer.ADD_EOS: False,
        Keys.Tokenizer.ADD_PREFIX: has_dummy_prefix(sp),
    }
    require_fields(graph, expected)
    return f"vocabulary: {identity.vocab_size:,} pieces with scores and types as in the SentencePiece model"


def require_fields(graph: Graph, expected: Mapping[str, object]) -> None:
    for name, value in expected.items():
        if graph.fields.get(name) != value:
            found = str(graph.fields.get(name))
            raise ValueError(f"the file's {name} is not that of the model, but {found[:60]}")


def same_graph(source: Source, graph: Graph, variant: str, tokens: Sequence[Sequence[int]]) -> str:
    """3: the file through llama.cpp's graph, against our forward."""
    found = torch.cat([graph(torch.tensor(ids)) for ids in tokens])
    largest = (found - logits_of(as_stored(source, variant), tokens)).abs().max().item()
    if not largest <= GRAPH:
        raise ValueError(f"llama.cpp's graph makes logits of this file that differ from ours by up to {largest:.2g}")
    return f"graph: llama.cpp's, in fp64 from the file, has our logits to {largest:.1e} (at most {GRAPH})"


def same_f32_form(source: Source, tokens: Sequence[Sequence[int]], unrounded: Tensor) -> str:
    """4: the F32 form in llama.cpp, against our logits without rounding of activations."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "f32.gguf"
        write(source, file, Options("f32"))
        found = torch.from_numpy(gguf_llama.ask(file, tokens, [])[0])
    error = ((found - unrounded).abs().max() / unrounded.abs().max()).item()
    if not error <= LLAMA:
        raise ValueError(f"llama.cpp's logits of the F32 form differ from ours by up to {error:.2g} of the largest")
    return f"llama.cpp: the F32 form has our logits to {error:.1e} of the largest (at most {LLAMA})"


def near(found: Tensor, trained: Tensor, unrounded: Tensor) -> str:
    """5: what llama.cpp makes of the file at hand, against the model as trained."""
    divergence, bound = mean_divergence(trained, found), max(KL, 4 * mean_divergence(trained, unrounded))
    if not divergence <= bound:
        raise ValueError(f"llama.cpp's distribution is {divergence:.2g} nats from the model's; at most {bound:.2g}")
    return f"llama.cpp: mean KL {divergence:.1e} nats from the model as trained (at most {bound:.2g})"


def same_ids(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[list[int]]) -> str:
    """6: llama.cpp's tokenizer."""
    for text, ids in zip(texts, found, strict=True):
        if ids != (want := tokenizer.processor.encode(text)):
            raise ValueError(f"llama.cpp's ids of {text[:60]!r} are {ids[:12]}, in training {want[:12]}")
    return f"llama.cpp: the ids of {len(texts):,} texts are SentencePiece's"


def made_of_text(tokenizer: Tokenizer) -> list[str]:
    """Special pieces that llama.cpp, other than SentencePiece, merges out of a text that holds their name: those that
    are two other pieces end to end, where any one character counts as a piece."""
    sp = tokenizer.processor
    special = {sp.id_to_piece(i): sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) for i in range(sp.vocab_size())}

    def joined(name: str) -> bool:
        parts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        return any(all(len(part) == 1 or part in special for part in pair) for pair in parts)

    return [name for name, is_special in special.items() if is_special and joined(name)]


def as_stored(source: Source, variant: str) -> Model:
    """Our model in fp64 with the values that a file of this variant holds, and activations that are not rounded."""
    stored, c = VARIANTS[variant], source.config
    eps, theta = (float(np.float32(value)) for value in (c.norm_eps, c.rope_theta))  # GGUF's floats
    model = Model(replace(c, quantization="none", norm_eps=eps, rope_theta=theta), torch.float64).double()
    state = {name: values.double() for name, values in source.model.state_dict().items()}
    for name, layer in source.model.named_modules():
        if isinstance(layer, BitLinear):
            state[name + ".weight"] = layer.codes.double() * layer.scale.double()[:, None]
        elif name + ".weight" in state and state[name + ".weight"].dim() == 2:
            state[name + ".weight"] = torch.from_numpy(rounded(layer.weight.detach().numpy(), stored.matrices)).double()
    embedding = rounded(source.model.embedding.detach().numpy(), stored.embedding)
    state["embedding"] = torch.from_numpy(embedding).double()
    model.load_state_dict(state)
    return model


def rounded(values: np.ndarray, type: Type) -> np.ndarray:
    """fp32 values after a way through a GGUF type."""
    return np.asarray(gguf.dequantize(gguf.quantize(values, type), type))


@torch.no_grad()
def logits_of(model: Model, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Our logits of the sequences, end to end: (sum of lengths, V) in fp64."""
    return torch.cat([model(torch.tensor([ids]))[0] for ids in tokens]).double()
