"""What a job is before it runs: parameters, tokens, FLOPs, schedule, memory, disk and time. Pure: no files, no clock.

Everything is derived from the settings and from the model itself, built without memory; nothing is typed twice.
Bytes and FLOPs are whole numbers in the result and GB = 10^9 bytes where people read them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from shared.manifest import Manifest
from shared.progress import duration
from train import cross_entropy, runtime, schedule
from train.config import Config, ModelConfig, with_vocabulary
from train.model import Model

LENGTH = 1024  # tokens of a sequence, where no data set says
# Cards by the GB they are sold with. They hold 7% more (GiB), which is left to CUDA itself and to fragmentation.
CARDS = (8, 16, 24, 80)
FP32, BF16 = 4, 2  # bytes: master weights, gradients, moments and norms; products and codes on a GPU


@dataclass(frozen=True)
class Parameters:
    """Counts, from the model's own tensors. attention and ffn are those of one layer, each with its norm."""

    embedding: int  # also the head
    layers: int
    attention: int
    ffn: int
    layer: int
    final_norm: int
    total: int


@dataclass(frozen=True)
class Knot:
    """The schedule at one step."""

    step: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the worst moment of a step, an estimate of eager execution with bf16 products."""

    micro: int  # sequences at once
    parameters: int
    gradients: int
    moments: int
    codes: int  # derived from the matrices: codes and their product with the scale; the twin's are its bf16 copies
    activations: int  # what backward needs of the forward pass
    working: int  # on top at the worst moment: in the loss, or in a layer's backward
    total: int


@dataclass(frozen=True)
class Disk:
    """Bytes of checkpoints; the tensors alone, names and random state add less than 0.1 MB to each."""

    checkpoint: int
    most: int  # there at once: those kept for good, the newest, and the one being written
    total: int


@dataclass(frozen=True)
class Time:
    """How long the steps take at a speed; evaluations and saves come on top."""

    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class DataSet:
    """What a verified data set has, and whether that is enough."""

    id: str
    vocab_size: int
    sequences: int  # of the train split
    val_sequences: int
    enough: bool


@dataclass(frozen=True)
class Plan:
    """A job. `fits` has the largest micro-batch of the ladder for each card of CARDS, None where not even 1 fits."""

    preset: str
    quantization: str
    parameters: Parameters
    batch: int  # sequences an update
    sequence_length: int
    steps: int
    sequences: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token: int
    flops: int
    schedule: list[Knot]
    memory: list[Memory]
    fits: dict[int, int | None]
    disk: Disk
    time: Time | None
    data: DataSet | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: Config, manifest: Manifest | None = None, speed: float | None = None) -> Plan:
    """The plan of a job on a data set, on sequences of LENGTH without one; `speed` in tokens a second, if known.

    ValueError when the vocabulary is not that of the data set, or is that of a data set nobody has named.
    """
    if manifest is not None:
        config = with_vocabulary(config, manifest.tokenizer.vocab_size)
    if config.model.vocab_size is None:
        raise ValueError(f"preset {config.preset} takes its vocabulary from the data set: name one with --data DIR")
    length = manifest.sequence_length if manifest else LENGTH
    parameters = count(config.model)
    batch, steps = config.batch.sequences, config.schedule.total_steps
    tokens = steps * batch * length
    flops_per_token = runtime.flops_per_token(config.model, length)
    micros = [config.batch.micro] if config.batch.micro else runtime.ladder(batch, "cuda")
    memory = [memory_of(config.model, length, micro) for micro in micros]
    checkpoint = parameters.total * (FP32 + 2 * FP32)  # the parameters, and two moments each
    most = most_checkpoints(config)
    return Plan(
        preset=config.preset,
        quantization=config.model.quantization,
        parameters=parameters,
        batch=batch,
        sequence_length=length,
        steps=steps,
        sequences=steps * batch,
        tokens=tokens,
        tokens_per_parameter=tokens / parameters.total,
        flops_per_token=flops_per_token,
        flops=flops_per_token * tokens,
        schedule=knots(config),
        memory=memory,
        fits={card: next((m.micro for m in memory if m.total <= card * 10**9), None) for card in CARDS},
        disk=Disk(checkpoint, most, most * checkpoint),
        time=Time(speed, tokens / speed) if speed else None,
        data=data_set(manifest, steps * batch) if manifest else None,
    )


def data_set(manifest: Manifest, needed: int) -> DataSet:
    """What there is, against the `needed` sequences of the whole schedule."""
    there = manifest.splits["train"].sequences
    val = manifest.splits["val"].sequences if "val" in manifest.splits else 0
    return DataSet(manifest.id, manifest.tokenizer.vocab_size, there, val, enough=there >= needed)


def count(config: ModelConfig) -> Parameters:
    """Count the parameters of the model that would train."""
    with torch.device("meta"):
        model = Model(config)
    layer = model.layers[0]
    found = Parameters(
        embedding=model.embedding.numel(),
        layers=len(model.layers),
        attention=_size(layer.attention) + _size(layer.attention_norm),  # type: ignore[arg-type]
        ffn=_size(layer.ffn) + _size(layer.ffn_norm),  # type: ignore[arg-type]
        layer=_size(layer),
        final_norm=_size(model.norm),
        total=_size(model),
    )
    assert found.layer == found.attention + found.ffn
    assert found.total == found.embedding + found.layers * found.layer + found.final_norm
    return found


def knots(config: Config) -> list[Knot]:
    """The schedule where it turns: the first step, the last of each leg, and the first of the next."""
    s = config.schedule
    steps = sorted({1, s.warmup_steps, s.warmup_steps + 1, s.middle_step, s.middle_step + 1, s.total_steps})
    return [Knot(n, schedule.lr(n, s), schedule.weight_decay(n, s)) for n in steps]


def most_checkpoints(config: Config) -> int:
    """Checkpoints there at once at the end: the newest ones, the one in writing, and the ones kept for good."""
    c = config.checkpoint
    for_good = (config.schedule.total_steps - 1) // c.keep_every if c.keep_every else 0
    return for_good + c.keep_last + 1


def memory_of(config: ModelConfig, length: int, micro: int) -> Memory:
    """Estimate the memory of a step with `micro` sequences of `length` tokens at once."""
    assert config.vocab_size is not None
    counted = count(config)
    norms = (2 * config.layers + 1) * config.hidden
    matrices = counted.total - counted.embedding - norms
    bitnet = config.quantization == "bitnet"
    fixed = {
        "parameters": FP32 * counted.total,
        "gradients": FP32 * counted.total,
        "moments": 2 * FP32 * counted.total,
        "codes": BF16 * matrices * (2 if bitnet else 1),
    }
    tokens = micro * length
    activations = tokens * (config.layers * kept_by_layer(config) + kept_by_head(config))
    working = max(loss_bytes(config, tokens), backward_bytes(config, tokens))
    total = sum(fixed.values()) + activations + working
    return Memory(micro, **fixed, activations=activations, working=working, total=total)


def kept_by_layer(config: ModelConfig) -> int:
    """Bytes a token that backward needs of one layer."""
    c, f, keys = config.hidden, config.ffn, config.kv_heads * config.head_dim
    norm = BF16 * c + FP32 * c  # its input, and that normalised, before the weight
    attention = (
        BF16 * c  # input of qkv, quantised
        + BF16 * (c + 2 * keys)  # qkv with q and k turned
        + FP32 * config.heads  # the logarithms of attention's sums
        + BF16 * c  # what attention gives
        + BF16 * c  # input of the output projection, quantised
    )
    ffn = (
        BF16 * c  # input of gate and up, quantised
        + BF16 * 2 * f  # gate and up
        + BF16 * f  # input of down, quantised
    )
    return 2 * norm + attention + ffn


def kept_by_head(config: ModelConfig) -> int:
    """Bytes a token around the layers: RoPE's angles, the final norm, its result in bf16, and the gradient of that."""
    return FP32 * config.head_dim + (BF16 + FP32) * config.hidden + 2 * BF16 * config.hidden


def loss_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the loss at its worst moment, the worst of a step with few tokens (train/cross_entropy.py)."""
    assert config.vocab_size is not None
    chunk = min(tokens, cross_entropy.CHUNK)
    several = tokens > chunk
    logits = FP32 + FP32 + BF16 + (BF16 if several else 0)  # logits, their logarithms, the slope and the one before
    head = BF16 + (2 * FP32 if several else 0)  # the head in bf16; its gradient, and the share of a chunk
    return chunk * config.vocab_size * logits + config.vocab_size * config.hidden * head


def backward_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of a layer's backward at its worst moment, the worst of a step with many tokens: SwiGLU (train/rows.py)."""
    of_swiglu = 7 * FP32 * config.ffn  # gate, up, silu(gate), three gradients and one on its way, all in fp32
    return tokens * (of_swiglu + 2 * BF16 * config.hidden)


def table(plan: Plan) -> Iterator[str]:
    """The plan for people, a line at a time."""
    p = plan.parameters
    kind = "BitNet b1.58" if plan.quantization == "bitnet" else "full precision"
    yield f"parameters {p.total:,}: {plan.preset}, {kind}"
    yield f"           = embedding, also the head, {p.embedding:,}"
    yield f"           + {p.layers} layers x {p.layer:,} (attention {p.attention:,} + feed-forward {p.ffn:,})"
    yield f"           + final norm {p.final_norm:,}"
    yield f"tokens     {plan.tokens:,} = {plan.steps:,} steps x {plan.batch} sequences x {plan.sequence_length:,}"
    yield f"           {plan.tokens_per_parameter:.1f} a parameter"
    yield f"cost       {plan.flops_per_token / 1e6:,.1f} MFLOP a token, {plan.flops:.3g} FLOP in all"
    if plan.time:
        yield f"time       {duration(plan.time.seconds)} at {plan.time.tokens_per_second:,.0f} tokens/s"
    else:
        yield "time       give --speed TOKENS_PER_SECOND, as a run prints it"
    yield f"disk       {gb(plan.disk.total)} for checkpoints: at most {plan.disk.most} of {gb(plan.disk.checkpoint)}"
    if plan.data:
        d = plan.data
        yield f"data       id {d.id}, every file verified, {d.vocab_size:,} ids"
        yield f"           {d.sequences:,} train sequences for the {plan.sequences:,} of the schedule: " + (
            "enough" if d.enough else f"{plan.sequences - d.sequences:,} too few"
        )
        yield f"           {d.val_sequences:,} validation sequences"
    yield ""
    yield f"{'step':>10}  {'learning rate':>13}  {'weight decay':>12}"
    yield from (f"{k.step:>10,}  {k.lr:>13.6e}  {k.weight_decay:>12g}" for k in plan.schedule)
    yield ""
    yield "memory on a GPU in GB, an estimate until a run has measured it (every run tries before its first step)"
    names = ("parameters", "gradients", "moments", "codes", "activations", "working", "total")
    yield "  micro  " + "  ".join(f"{name:>11}" for name in names)
    for memory in plan.memory:
        yield f"{memory.micro:>7}  " + "  ".join(f"{getattr(memory, name) / 1e9:>11.2f}" for name in names)
    chosen = (f"{card} GB: {micro or 'none fits'}" for card, micro in plan.fits.items())
    yield f"micro-batch that fits    {'    '.join(chosen)}"


def gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
