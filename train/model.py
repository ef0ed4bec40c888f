"""The network: a decoder whose every linear layer is a BitLinear behind a norm, and its full-precision twin.

Shapes: B sequences, T positions, C hidden, H query heads, G key/value heads, D head_dim, F ffn, V vocabulary.
The layout is that of Transformers' BitNetForCausalLM (hidden_act silu, sub-norm weights of one) and of llama.cpp's
bitnet graph: a learnable RMSNorm before attention and before the FFN, a parameter-free one before the output and the
down projection ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", Fig. 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.bitlinear import BitLinear
from train.config import ModelConfig
from train.cross_entropy import Softmax, cross_entropy, softmax_slope
from train.rows import Rotation, exact_dtype, rms_norm, rotate, swiglu_norm

KEYS_VALUES = tuple[Tensor, Tensor]  # of one layer, each (B, G, positions so far, D)


class Model(nn.Module):
    """Tokens to logits or to a loss. `compute` is the dtype of matrix products and activations; parameters are fp32.

    Call `initialise` or load a state, then `requantize` after that and after every update of the parameters.
    """

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert config.vocab_size is not None, "with_vocabulary comes first"
        self.config, self.compute = config, compute
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden))  # tied: also the head
        self.layers = nn.ModuleList(Block(config, compute) for _ in range(config.layers))
        self.norm = Norm(config.hidden, config.norm_eps)
        self.softmax: Softmax = softmax_slope  # or the same, compiled
        counts = self.num_parameters()
        assert sum(counts.values()) == sum(p.numel() for p in self.parameters())
        assert config != ModelConfig() or sum(counts.values()) == 95_367_936

    def forward(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, V), fp32 or wider. With a cache, tokens follow those it has seen."""
        hidden = self.hidden_states(tokens, cache)
        return F.linear(hidden.to(self.compute), self.embedding.to(self.compute)).to(exact_dtype(self.compute))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, T) and (B, T) int64 -> mean cross-entropy in nats, a scalar in fp32; logits never stand whole."""
        hidden = self.hidden_states(tokens, None)
        return cross_entropy(hidden.flatten(0, 1).to(self.compute), self.embedding, labels.flatten(), self.softmax)

    def hidden_states(self, tokens: Tensor, cache: "Cache | None") -> Tensor:
        """(B, T) int64 -> (B, T, C), normed."""
        self.assert_fresh()
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        rotation = rotary(positions.repeat(len(tokens)), self.config.head_dim, self.config.rope_theta)
        x = F.embedding(tokens, self.embedding).to(self.compute)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.length += tokens.shape[1]
        normed: Tensor = self.norm(x)
        return normed

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill the parameters from `seed`: norms one, all else normal with init_std. The same on every device."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(values.normal_(0.0, self.config.init_std, generator=generator))
        self.requantize()

    def requantize(self) -> None:
        """Rebuild the codes of every BitLinear: once an update, never a micro-batch."""
        for layer in self.bitlinears():
            layer.quantize()

    def assert_fresh(self) -> None:
        for layer in self.bitlinears():
            assert layer.fresh, "stale codes: requantize() must follow every change of the parameters"

    def bitlinears(self) -> list[BitLinear]:
        return [module for module in self.modules() if isinstance(module, BitLinear)]

    def projections(self) -> "Iterator[Projection]":
        """The seven matrices of each layer, fused ones apart, in the order of the forward pass."""
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            for linear, names in (
                (block.attention.qkv, ("q", "k", "v")),
                (block.attention.output, ("o",)),
                (block.ffn.gate_up, ("gate", "up")),
                (block.ffn.down, ("down",)),
            ):
                for name, size, stop in zip(names, linear.segments, accumulate(linear.segments), strict=True):
                    yield Projection(i, name, linear, slice(stop - size, stop))

    def num_parameters(self) -> dict[str, int]:
        """Counts by group; the embedding is also the head and counts once."""
        c = self.config
        heads = (c.heads + 2 * c.kv_heads) * c.head_dim
        return {
            "embedding": self.embedding.numel(),
            "attention": c.layers * c.hidden * (heads + c.heads * c.head_dim),
            "ffn": c.layers * c.hidden * 3 * c.ffn,
            "norms": (2 * c.layers + 1) * c.hidden,
        }


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, compute: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = Norm(config.hidden, config.norm_eps)
        self.attention = Attention(config, compute)
        self.ffn_norm = Norm(config.hidden, config.norm_eps)
        self.ffn = FeedForward(config, compute)

    def forward(self, x: Tensor, rotation: Rotation, cache: "LayerCache | None") -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)  # (B, T, C)
        x = x + self.ffn(self.ffn_norm(x))
        return x


class Attention(nn.Module):
    """Causal attention, G key/value heads shared by H query heads; no mask between documents."""

    def __init__(self, config: ModelConfig, compute: torch.dtype) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv = linear(config, config.hidden, (queries, keys, keys), compute)
        self.output = linear(config, queries, (config.hidden,), compute)

    def forward(self, x: Tensor, rotation: Rotation, cache: "LayerCache | None") -> Tensor:
        c = self.config
        qkv = self.qkv(x).view(-1, c.heads + 2 * c.kv_heads, c.head_dim)  # (B x T, H + 2G, D)
        qkv = rotate(qkv, rotation, c.heads + c.kv_heads, attention_dtype(x.device, qkv.dtype))
        qkv = qkv.view(*x.shape[:2], *qkv.shape[1:]).transpose(1, 2)
        q, k, v = torch.split(qkv, [c.heads, c.kv_heads, c.kv_heads], dim=1)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H x D)
        out: Tensor = self.output(rms_norm(y, c.norm_eps))
        return out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, config: ModelConfig, compute: torch.dtype) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.gate_up = linear(config, config.hidden, (config.ffn, config.ffn), compute)
        self.down = linear(config, config.ffn, (config.hidden,), compute)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu_norm(self.gate_up(x), self.norm_eps))  # (B, T, 2F) in between
        return out


class Norm(nn.Module):
    """RMSNorm with a learnable weight; the result is fp32 or wider, as what quantises it wants."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


class Linear(nn.Module):
    """The twin of BitLinear: the same weight, used as it is."""

    def __init__(self, in_features: int, segments: tuple[int, ...], compute: torch.dtype) -> None:
        super().__init__()
        self.segments, self.compute = segments, compute
        self.weight = nn.Parameter(torch.empty(sum(segments), in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.compute), self.weight.to(self.compute))


@dataclass(frozen=True)
class Projection:
    """A matrix with a scale of its own: those `rows` of the weight of `linear`."""

    layer: int  # from 0
    name: str  # q, k, v, o, gate, up or down
    linear: BitLinear | Linear
    rows: slice

    @property
    def weight(self) -> Tensor:
        """(out features, in features), full precision."""
        return self.linear.weight[self.rows]

    @property
    def codes(self) -> Tensor | None:
        """(out features, in features) of -1, 0, 1; None for the twin's."""
        return self.linear.codes[self.rows] if isinstance(self.linear, BitLinear) else None

    @property
    def scale(self) -> Tensor | None:
        """(1,); None for the twin's."""
        return self.linear.scale[self.rows][:1] if isinstance(self.linear, BitLinear) else None


class Cache:
    """Keys and values of the positions seen so far, for generation; room for `capacity` positions."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        c, where = model.config, model.embedding.device
        shape = (c.layers, 2, batch, c.kv_heads, capacity, c.head_dim)
        self.store = torch.empty(shape, dtype=attention_dtype(where, model.compute), device=where)
        self.capacity, self.length = capacity, 0

    def layer(self, i: int) -> "LayerCache":
        return LayerCache(self.store[i], self.length)


class LayerCache:
    """One layer's part of a Cache, `start` positions full."""

    def __init__(self, store: Tensor, start: int) -> None:
        self.store, self.start = store, start  # (2, B, G, capacity, D)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add (B, G, T, D) each; all keys and values so far, and the mask (T, so far) of what each position sees."""
        stop = self.start + k.shape[2]
        assert stop <= self.store.shape[3], "the cache is full"
        self.store[0, :, :, self.start : stop] = k
        self.store[1, :, :, self.start : stop] = v
        mask = torch.ones(k.shape[2], stop, dtype=torch.bool, device=k.device).tril(self.start)
        return self.store[0, :, :, :stop], self.store[1, :, :, :stop], mask


def linear(
    config: ModelConfig, in_features: int, segments: tuple[int, ...], compute: torch.dtype
) -> "BitLinear | Linear":
    kind = BitLinear if config.quantization == "bitnet" else Linear
    return kind(in_features, segments, compute)


def attention_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """fp32 on CPUs: torch's attention there is faster in fp32 than in bf16, and 10,000 times as exact."""
    return exact_dtype(compute) if device.type == "cpu" else compute


def rotary(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """(M,) -> cos and sin, (M, D/2) each, in fp32: angle = position x theta^(-2i/D)."""
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions.float()[:, None] * frequency
    return angle.cos(), angle.sin()
