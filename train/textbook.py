"""The baseline of `train bench`: the same network as one would write it from the papers, in plain PyTorch.

BitLinear is the listing of "The Era of 1-bit LLMs: Training Tips, Code and FAQ": weights and activations are quantised
in every forward pass, rounding is skipped by `x + (quant(x) - x).detach()`, and autograd does the rest. Around it stand
torch's own rms_norm, attention, cross_entropy over all logits, and autocast where the device has bf16.
Parameters have the names and shapes of train/model.py, so that one state fits both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ModelConfig
from train.model import rotary


class Textbook(nn.Module):
    """Tokens to a loss; fp32 parameters. Under autocast to bf16 the products are in bf16."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden))
        self.layers = nn.ModuleList(TextbookBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, T) and (B, T) int64 -> mean cross-entropy in nats, a scalar."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rotation = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, rotation)
        logits = F.linear(self.norm(x), self.embedding)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TextbookBlock(nn.Module):
    """One layer; attention and feed-forward hold their weights under the names of train/model.py."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, keys = config, config.kv_heads * config.head_dim
        self.config = config
        self.attention_norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.attention = nn.ModuleDict(
            {
                "qkv": TextbookBitLinear(c.hidden, (c.hidden, keys, keys)),
                "output": TextbookBitLinear(c.hidden, (c.hidden,)),
            }
        )
        self.ffn_norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.ffn = nn.ModuleDict(
            {"gate_up": TextbookBitLinear(c.hidden, (c.ffn, c.ffn)), "down": TextbookBitLinear(c.ffn, (c.hidden,))}
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        c = self.config
        qkv = self.attention["qkv"](self.attention_norm(x)).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        q, k = (rotated(heads, rotation).to(v.dtype) for heads in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + self.attention["output"](F.rms_norm(y, (c.hidden,), eps=c.norm_eps))
        gate, up = self.ffn["gate_up"](self.ffn_norm(x)).chunk(2, dim=-1)
        out: Tensor = x + self.ffn["down"](F.rms_norm(F.silu(gate) * up, (c.ffn,), eps=c.norm_eps))
        return out


class TextbookBitLinear(nn.Module):
    """The listing's BitLinear; one scale for each of the fused matrices."""

    def __init__(self, in_features: int, segments: tuple[int, ...]) -> None:
        super().__init__()
        self.segments = segments
        self.weight = nn.Parameter(torch.empty(sum(segments), in_features))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w_quant = torch.cat([weight_quant(part) for part in torch.split(w, list(self.segments))])
        return F.linear(x + (activation_quant(x) - x).detach(), w + (w_quant - w).detach())


def activation_quant(x: Tensor) -> Tensor:
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def weight_quant(w: Tensor) -> Tensor:
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (torch.cat((part, part), dim=-1) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
