"""Our parameters under Transformers' names: fused matrices apart, as they are or as 2-bit codes with a scale each."""

import torch
from torch import Tensor

from train.model import Block, Model, Projection

PER_BYTE = 4  # codes of 2 bits
NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def state(model: Model, form: str) -> dict[str, Tensor]:
    """The tensors of model.safetensors under Transformers' names; there is no lm_head, it is the embedding."""
    c = model.config
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        name = f"model.layers.{i}."
        tensors[name + "input_layernorm.weight"] = layer.attention_norm.weight
        tensors[name + "post_attention_layernorm.weight"] = layer.ffn_norm.weight
        tensors[name + "self_attn.attn_sub_norm.weight"] = torch.ones(c.hidden)
        tensors[name + "mlp.ffn_sub_norm.weight"] = torch.ones(c.ffn)
    for matrix in model.projections():
        name = name_of(matrix)
        if form == "packed":
            assert matrix.codes is not None and matrix.scale is not None
            tensors[name + ".weight"] = packed(matrix.codes)
            tensors[name + ".weight_scale"] = 1 / matrix.scale
        else:
            tensors[name + ".weight"] = matrix.weight
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def name_of(matrix: Projection) -> str:
    """What Transformers calls the linear layer that holds this matrix alone."""
    return f"model.layers.{matrix.layer}.{NAMES[matrix.name]}"


def packed(codes: Tensor) -> Tensor:
    """(N, K) of -1, 0, 1 -> (N/4, K) uint8: bits 2j and 2j+1 of row i are 1 + the code of row i + j x N/4."""
    a, b, c, d = (codes + 1).to(torch.uint8).chunk(PER_BYTE)
    return a | b << 2 | c << 4 | d << 6
