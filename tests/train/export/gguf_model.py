"""A small model that nobody has trained, whose every tensor differs from every other, as an export's source."""

from dataclasses import replace

import torch

from shared.tokenizer import Tokenizer, load_tokenizer
from tests.train.dataset import GOLDEN
from train import runtime
from train.config import Config, ModelConfig
from train.export.source import Source
from train.model import Model
from train.run_folder import Facts

TOKENIZER = GOLDEN / "tokenizer.model"
SMALL = ModelConfig(hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=512, init_std=0.05)


def source(config: ModelConfig = SMALL, tokenizer: Tokenizer | None = None, seed: int = 0) -> Source:
    """A source with random matrices and norms; the vocabulary is the tokenizer's."""
    tokenizer = tokenizer or load_tokenizer(TOKENIZER)
    model = Model(replace(config, vocab_size=tokenizer.identity.vocab_size))
    model.initialise(seed)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=noise)
    model.requantize()
    facts = Facts(Config(preset="tiny", model=model.config), "ab" * 32, 64, runtime.choose("cpu", 1))
    return Source("small", model, tokenizer, facts, step=7, provenance={"commit": "c0ffee"})
