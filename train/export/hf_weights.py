"""Our parameters under Transformers' names: fused matrices apart, as they are or as 2-bit codes with a scale each."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from train.bitlinear import BitLinear
from train.model import Block, Linear, Model

PER_BYTE = 4  # codes of 2 bits


def state(model: Model, form: str) -> dict[str, Tensor]:
    """The tensors of model.safetensors under Transformers' names; there is no lm_head, it is the embedding."""
    c = model.config
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(blocks(model)):
        name = f"model.layers.{i}."
        tensors[name + "input_layernorm.weight"] = layer.attention_norm.weight
        tensors[name + "post_attention_layernorm.weight"] = layer.ffn_norm.weight
        tensors[name + "self_attn.attn_sub_norm.weight"] = torch.ones(c.hidden)
        tensors[name + "mlp.ffn_sub_norm.weight"] = torch.ones(c.ffn)
    for name, matrix, rows in projections(model):
        if form == "packed":
            assert isinstance(matrix, BitLinear)
            tensors[name + ".weight"] = packed(matrix.codes[rows])
            tensors[name + ".weight_scale"] = 1 / matrix.scale[rows][:1]
        else:
            tensors[name + ".weight"] = matrix.weight[rows]
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def projections(model: Model) -> Iterator[tuple[str, BitLinear | Linear, slice]]:
    """Each of Transformers' linear layers: its name, our fused matrix, and which rows of that it is."""
    c = model.config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i, layer in enumerate(blocks(model)):
        for matrix, parts in (
            (layer.attention.qkv, {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}),
            (layer.attention.output, {"self_attn.o_proj": c.hidden}),
            (layer.ffn.gate_up, {"mlp.gate_proj": c.ffn, "mlp.up_proj": c.ffn}),
            (layer.ffn.down, {"mlp.down_proj": c.hidden}),
        ):
            start = 0
            for part, rows in parts.items():
                yield f"model.layers.{i}.{part}", matrix, slice(start, start + rows)
                start += rows


def packed(codes: Tensor) -> Tensor:
    """(N, K) of -1, 0, 1 -> (N/4, K) uint8: bits 2j and 2j+1 of row i are 1 + the code of row i + j x N/4."""
    a, b, c, d = (codes + 1).to(torch.uint8).chunk(PER_BYTE)
    return a | b << 2 | c << 4 | d << 6


def blocks(model: Model) -> list[Block]:
    return cast(list[Block], list(model.layers))
