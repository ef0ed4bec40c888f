"""The form that Transformers loads: a folder with config.json, model.safetensors, the tokenizer and a model card.

Everything is `BitNetForCausalLM` (hidden_act silu): of Transformers' models it alone has norms before the output and
the down projection. Ours have no parameters, so theirs get weights of one. Three forms of the linear layers:

    latent   the fp32 weights, quantised online (autobitlinear): can be trained further
    packed   2-bit codes, four output rows a byte, and one fp32 scale a projection (bitlinear)
    twin     plain linear layers; no Llama, because the full-precision twin has those two norms as well

Traps: bitlinear divides by `weight_scale`, so it is 1/mean|W| (autobitlinear offline would multiply by mean|W|);
`modules_to_not_convert` must name lm_head, or the head, which is the embedding, would become ternary; codes are never
given to a layer that quantises online, which would quantise them a second time, with another scale.
"""

from pathlib import Path
from typing import Any

from shared.durable import write_durably
from shared.manifest import text_of
from train.export import hf_proof
from train.export import tokenizer as tokenizer_files
from train.export.card import model_card
from train.export.command import Options
from train.export.hf_weights import PER_BYTE, state
from train.export.source import Source

WEIGHTS = "model.safetensors"


def write(source: Source, out: Path, options: Options) -> None:
    """Write the folder `out`. ValueError for a form that there is not."""
    from safetensors.torch import save

    form = form_of(source, options)
    tensors = state(source.model, form)
    out.mkdir()
    write_durably(out / WEIGHTS, save(tensors, {"format": "pt"}))
    write_durably(out / "config.json", text_of(config_json(source, form)))
    write_durably(out / "generation_config.json", text_of(generation_config(source)))
    write_durably(out / "README.md", model_card(source, form).encode())
    tokenizer_files.write(out, source.tokenizer, source.facts.sequence_length)


def form_of(source: Source, options: Options) -> str:
    """latent, packed or twin. ValueError for a packed twin, or rows that do not fill bytes."""
    if not source.quantized:
        if options.variant == "packed":
            raise ValueError("--variant packed: this run is a full-precision twin and has no codes; leave it out")
        return "twin"
    rows = {n for layer in source.model.bitlinears() for n in layer.segments}
    if options.variant == "packed" and any(n % PER_BYTE for n in rows):
        raise ValueError(f"--variant packed: four rows go into a byte, and a matrix has {max(rows)}; export latent")
    return options.variant


def config_json(source: Source, form: str) -> dict[str, Any]:
    """config.json: everything is said, also where it is today's default."""
    c, identity = source.config, source.tokenizer.identity
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.facts.sequence_length,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # Transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},  # Transformers 5
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": identity.bos_id,
        "eos_token_id": identity.eos_id,
        "pad_token_id": None,
        "dtype": "float32",
    }
    if form != "twin":
        config["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear" if form == "latent" else "bitlinear",
            "quantization_mode": "online" if form == "latent" else "offline",
            "modules_to_not_convert": ["lm_head"],
            "use_rms_norm": False,
        }
    return config


def generation_config(source: Source) -> dict[str, Any]:
    """generation_config.json: end at the end of a document; draw as `train sample` does."""
    identity = source.tokenizer.identity
    return {
        "bos_token_id": identity.bos_id,
        "eos_token_id": identity.eos_id,
        "pad_token_id": identity.eos_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }


def prove(source: Source, out: Path, options: Options) -> list[str]:
    """Load `out` by Transformers and compare; what holds, a line each. ValueError when anything does not."""
    return hf_proof.prove(source, out, form_of(source, options))
