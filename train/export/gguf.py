"""GGUF, the file of llama.cpp: its architecture `bitnet`, written straight from the codes.

    variant   matrices                              embeddings    for
    tq2_0     TQ2_0: 2 bits a code in blocks of 256  Q8_0          use
    f16       F16: the codes -1, 0, 1, exact         F16           use; a full-precision twin
    f32       F32                                    F32           proofs

Each matrix has its fp32 scale beside it as a tensor `<name>.scale` of one element, by which llama.cpp multiplies the
product: neither codes nor scales are rounded in any variant. The parameter-free norms are weights of one. The head is
the embedding, which the architecture takes where there is no `output`. llama.cpp quantises activations by its own
rules (TQ2_0: 8 bits by blocks of 256; f16 and f32: not at all), so its logits are near ours and not the same:
gguf_proof.py says how near. Formats: ggml/docs/gguf.md and src/models/bitnet.cpp of llama.cpp.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from shared.sentencepiece_model import pieces, unsafe_reason
from shared.tokenizer import has_dummy_prefix
from train.export.command import Options
from train.export.source import Source
from train.model import Block, Model

ARCHITECTURE = "bitnet"
PROVENANCE = "bitnet_fineweb_edu"  # prefix of our own keys
NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@dataclass(frozen=True)
class Stored:
    """How a variant keeps what is not fp32."""

    matrices: Type
    embedding: Type
    file: gguf.LlamaFileType


VARIANTS = {
    "tq2_0": Stored(Type.TQ2_0, Type.Q8_0, gguf.LlamaFileType.MOSTLY_TQ2_0),
    "f16": Stored(Type.F16, Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": Stored(Type.F32, Type.F32, gguf.LlamaFileType.ALL_F32),
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor by llama.cpp's name: `values` in fp32 as the model has them, and the type they are stored in."""

    name: str
    values: npt.NDArray[np.float32]
    type: Type

    def bytes(self) -> npt.NDArray[Any]:
        """The values as stored: fp32, fp16, or (rows, bytes a row) uint8 of blocks."""
        return gguf.quantize(self.values, self.type)


def write(source: Source, out: Path, options: Options) -> None:
    """Write the file `out`. ValueError when the variant or llama.cpp's tokenizer cannot hold this model."""
    require_fit(source, options.variant)
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    describe(writer, source, options.variant)
    add_vocabulary(writer, source)
    for tensor in tensors(source, options.variant):
        writer.add_tensor(tensor.name, tensor.bytes(), raw_dtype=tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    with out.open("rb") as file:
        os.fsync(file.fileno())


def prove(source: Source, out: Path, options: Options) -> list[str]:
    """What holds of the file, a line each. ValueError when anything does not."""
    from train.export.gguf_proof import prove as prove_file

    return prove_file(source, out, options.variant)


def require_fit(source: Source, variant: str) -> None:
    """ValueError for what llama.cpp could not say again."""
    config, stored = source.config, VARIANTS[variant]
    if variant == "tq2_0" and not source.quantized:
        raise ValueError(f"{source.name}: a full-precision twin has no codes; give --variant f16")
    for name, type, width in (
        ("model.hidden", stored.matrices, config.hidden),
        ("model.ffn", stored.matrices, config.ffn),
        ("model.hidden", stored.embedding, config.hidden),
    ):
        block, _ = gguf.GGML_QUANT_SIZES[type]
        if width % block:
            raise ValueError(
                f"{source.name}: {name} is {width} and {type.name} is made of blocks of {block}; give --variant f16"
            )
    if reason := unsafe_reason(source.tokenizer):
        raise ValueError(f"{source.name}: llama.cpp would encode texts in another way than this tokenizer: {reason}")


def describe(writer: gguf.GGUFWriter, source: Source, variant: str) -> None:
    """The hyperparameters that llama.cpp's graph reads, and where the model comes from. No times and no paths: the
    same checkpoint gives the same bytes."""
    c = source.config
    assert c.vocab_size is not None
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.name)
    writer.add_file_type(VARIANTS[variant].file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(source.facts.sequence_length)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    for name, value in origin(source).items():
        writer.add_string(name, value)


def origin(source: Source) -> dict[str, str]:
    """Where a model comes from, under keys of our own."""
    known = {
        "data_id": source.facts.data_id,
        "step": str(source.step),
        "commit": source.provenance["commit"] or "unknown",
        "tokenizer_sha256": source.tokenizer.identity.sha256,
    }
    return {f"{PROVENANCE}.{name}": value for name, value in known.items()}


def add_vocabulary(writer: gguf.GGUFWriter, source: Source) -> None:
    """The SentencePiece pieces; GGUF's token types have the numbers of SentencePiece's."""
    vocabulary, identity = pieces(source.tokenizer.model), source.tokenizer.identity
    assert len(vocabulary) == source.config.vocab_size
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in vocabulary])
    writer.add_token_scores([piece.score for piece in vocabulary])
    writer.add_token_types([piece.type for piece in vocabulary])
    writer.add_bos_token_id(identity.bos_id)
    writer.add_eos_token_id(identity.eos_id)
    writer.add_unk_token_id(identity.unk_id)
    writer.add_add_bos_token(True)  # a document begins with <s>
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(has_dummy_prefix(source.tokenizer.processor))


def tensors(source: Source, variant: str) -> Iterator[GGUFTensor]:
    """All tensors of the file, in order."""
    stored, model = VARIANTS[variant], source.model
    yield GGUFTensor("token_embd.weight", as_numpy(model.embedding), stored.embedding)
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for name, values in (
            ("attn_norm", block.attention_norm.weight),
            ("attn_sub_norm", torch.ones(block.attention.output.weight.shape[1])),
            ("ffn_norm", block.ffn_norm.weight),
            ("ffn_sub_norm", torch.ones(block.ffn.down.weight.shape[1])),
        ):
            yield GGUFTensor(f"blk.{i}.{name}.weight", as_numpy(values), Type.F32)
    for name, values, scale in matrices(model):
        yield GGUFTensor(f"{name}.weight", as_numpy(values), stored.matrices)
        if scale is not None:
            yield GGUFTensor(f"{name}.scale", as_numpy(scale), Type.F32)
    yield GGUFTensor("output_norm.weight", as_numpy(model.norm.weight), Type.F32)


def matrices(model: Model) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """llama.cpp's name of each matrix, its codes and (1,) scale, or a twin's weights without one."""
    for matrix in model.projections():
        values = matrix.weight if matrix.codes is None else matrix.codes
        yield f"blk.{matrix.layer}.{NAMES[matrix.name]}", values, matrix.scale


def as_numpy(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().float().contiguous().numpy()
    return array
