"""All settings of a run as frozen dataclasses, two presets, and `--set name=value` on top.

`identity` lists what shapes the trajectory: a resume with another value of any of these is another run.
"""

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the 95M model: 95,367,936 parameters."""

    hidden: int = 768  # width of the residual stream
    layers: int = 8
    heads: int = 12  # query heads; heads x head_dim = hidden
    kv_heads: int = 6  # key and value heads, each shared by heads / kv_heads query heads
    head_dim: int = 64
    ffn: int = 3072  # inner width of SwiGLU
    vocab_size: int | None = 32_000  # None: that of the data set
    quantization: Literal["bitnet", "none"] = "bitnet"  # none: the full-precision twin, all else equal
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02  # of every matrix and of the embeddings


@dataclass(frozen=True)
class BatchConfig:
    """What one update sees."""

    sequences: int = 32  # the global batch over all ranks and micro-batches: law
    micro: int | None = None  # sequences at once on a device; None: the most of 32, 16, 8, 4, 2, 1 that fits


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, linear through (0, 0), (warmup, peak), (middle, middle_lr), (total, final); decay until middle."""

    warmup_steps: int = 375
    middle_step: int = 30_000
    total_steps: int = 60_000
    peak_lr: float = 1.5e-3
    middle_lr: float = 1e-3
    final_lr: float = 1.5e-5
    weight_decay: float = 0.1  # on matrices only, for steps up to middle_step, then 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest global gradient norm


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and how much of it is kept."""

    every: int = 1_000  # steps; 0: never by steps
    minutes: float = 10.0  # since the last save; 0: never by time
    keep_last: int = 3  # newest checkpoints kept
    keep_every: int = 10_000  # steps whose checkpoints are kept for good; 0: none


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every: int = 500  # steps; 0: never
    sequences: int = 256  # the first of the validation split


@dataclass(frozen=True)
class SampleConfig:
    """Texts from fixed prompts during training."""

    every: int = 1_000  # steps; 0: never


@dataclass(frozen=True)
class ProbeConfig:
    """Measurements of the weights and codes during training."""

    every: int = 100  # steps; 0: never


@dataclass(frozen=True)
class Config:
    """Everything that can be set. Nested under the names that `--set` and config.json use."""

    preset: str
    seed: int = 0  # of initialisation and order
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


PRESETS = {
    # 1.966 billion predictions, 1.27e18 FLOP: under an hour on one H200, months on two CPU cores.
    "95m": Config(preset="95m"),
    # Minutes on two CPU cores; recognisable words after 300 steps.
    "tiny": Config(
        preset="tiny",
        model=ModelConfig(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768, vocab_size=None),
        batch=BatchConfig(sequences=8),
        schedule=ScheduleConfig(warmup_steps=20, middle_step=150, total_steps=300),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=100),
        sample=SampleConfig(every=100),
    ),
}


def preset(name: str) -> Config:
    """The preset of this name. ValueError lists the valid ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def apply_settings(config: Config, settings: Iterable[str]) -> Config:
    """`config` with each "name=value" applied in order, checked. ValueError names what is unknown or impossible."""
    nested = to_dict(config)
    names = flatten(nested)
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"--set {setting}: write it as name=value")
        if name not in names or name == "preset":
            near = max(names, key=lambda known: (_likeness(name, known), known))
            raise ValueError(f"--set {setting}: there is no setting {name!r}; did you mean {near}?")
        group, _, leaf = name.rpartition(".")
        where, cls = (nested[group], type(getattr(config, group))) if group else (nested, Config)
        where[leaf] = _parse(text.strip(), get_type_hints(cls)[leaf], name)
    return from_dict(nested)


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """`config` for a data set of this vocabulary. ValueError when the model has another."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted != vocab_size:
        raise ValueError(
            f"model.vocab_size is {wanted} (preset {config.preset}) and the data set has {vocab_size} ids; "
            f"tokenize with a vocabulary of {wanted} or use --preset tiny"
        )
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def identity(config: Config) -> dict[str, Any]:
    """Flat {name: value} of the settings that shape the trajectory. batch.micro is resolved by the runtime."""
    shaping = ("seed", "model.", "batch.sequences", "schedule.", "optimizer.")
    return {name: value for name, value in flatten(to_dict(config)).items() if name.startswith(shaping)}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, in order."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as config.json holds them."""
    return asdict(config)


def from_dict(value: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`: exactly its fields and types, checked. ValueError names the first that is wrong."""
    config = _build(Config, value, "")
    _check(config)
    return config


def _build(cls: type[C], value: Any, prefix: str) -> C:
    assert is_dataclass(cls)
    if not isinstance(value, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'the settings'}: expected an object, found {value!r}")
    known = [f.name for f in fields(cls)]
    for name in [*value, *known]:
        if name not in known:
            raise ValueError(f"{prefix}{name}: there is no such setting")
        if name not in value:
            raise ValueError(f"{prefix}{name}: missing")
    hints = get_type_hints(cls)
    built = {}
    for name in known:
        built[name] = _build(hints[name], value[name], f"{prefix}{name}.") if is_dataclass(hints[name]) else value[name]
        if not is_dataclass(hints[name]):
            _check_type(value[name], hints[name], prefix + name)
    return cls(**built)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _check_type(value: Any, hint: Any, name: str) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name}={value}: choose one of {', '.join(map(str, get_args(hint)))}")
    elif type(value) not in _kinds(hint):
        raise ValueError(f"{name}={value!r}: expected {_describe(hint)}")


def _parse(text: str, hint: Any, name: str) -> Any:
    """`text` as a value of type `hint`: int, float, a Literal of strings, or one of these or None ("none", "auto")."""
    kinds = _kinds(hint)
    if type(None) in kinds and text.lower() in ("none", "auto"):
        return None
    for kind in kinds:
        try:
            if kind is int:
                return int(text)  # takes 1_000 as well
            if kind is float:
                return float(text)
        except ValueError:
            continue
    if get_origin(hint) is Literal:
        _check_type(text, hint, name)
        return text
    raise ValueError(f"{name}={text}: expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", type(None): "none"}
    return " or ".join(words[kind] for kind in _kinds(hint))


def _likeness(name: str, known: str) -> float:
    leaf = known.rpartition(".")[2]
    return max(difflib.SequenceMatcher(None, name, form).ratio() for form in (known, leaf))


def _check(config: Config) -> None:
    """Refuse numbers that no run can have."""
    model, batch, schedule, optimizer = config.model, config.batch, config.schedule, config.optimizer

    def require(holds: bool, name: str, why: str) -> None:
        if not holds:
            raise ValueError(f"{name}={flatten(to_dict(config))[name]}: {why}")

    for name, value in flatten(to_dict(config)).items():
        require(not isinstance(value, float) or math.isfinite(value), name, "must be finite")
    require(0 <= config.seed < 1 << 63, "seed", "must be from 0 to 2^63 - 1")
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn"):
        require(getattr(model, name) >= 1, f"model.{name}", "must be at least 1")
    require(model.vocab_size is None or 2 <= model.vocab_size <= 1 << 16, "model.vocab_size", "must be 2 to 65,536")
    require(model.heads % model.kv_heads == 0, "model.kv_heads", f"must divide model.heads={model.heads}")
    require(model.head_dim % 2 == 0, "model.head_dim", "must be even: RoPE turns pairs")
    require(model.heads * model.head_dim == model.hidden, "model.hidden", "must be model.heads x model.head_dim")
    for name in ("rope_theta", "norm_eps", "init_std"):
        require(getattr(model, name) > 0, f"model.{name}", "must be above 0")
    require(batch.sequences >= 1, "batch.sequences", "must be at least 1")
    fits = batch.micro is None or (batch.micro >= 1 and batch.sequences % batch.micro == 0)
    require(fits, "batch.micro", f"must divide batch.sequences={batch.sequences}")
    require(schedule.warmup_steps >= 1, "schedule.warmup_steps", "must be at least 1")
    require(
        schedule.middle_step > schedule.warmup_steps,
        "schedule.middle_step",
        f"must be above schedule.warmup_steps={schedule.warmup_steps}",
    )
    require(
        schedule.total_steps > schedule.middle_step,
        "schedule.total_steps",
        f"must be above schedule.middle_step={schedule.middle_step}",
    )
    for name in ("peak_lr", "middle_lr", "final_lr", "weight_decay"):
        require(getattr(schedule, name) >= 0, f"schedule.{name}", "must not be negative")
    for name in ("beta1", "beta2"):
        require(0 <= getattr(optimizer, name) < 1, f"optimizer.{name}", "must be from 0 up to, not including, 1")
    require(optimizer.eps > 0, "optimizer.eps", "must be above 0")
    require(optimizer.clip > 0, "optimizer.clip", "must be above 0")
    for name in ("checkpoint.every", "checkpoint.minutes", "checkpoint.keep_every", "eval.every", "sample.every"):
        require(flatten(to_dict(config))[name] >= 0, name, "must not be negative (0: never)")
    require(config.probe.every >= 0, "probe.every", "must not be negative (0: never)")
    require(config.checkpoint.keep_last >= 1, "checkpoint.keep_last", "must be at least 1")
    require(config.eval.sequences >= 1, "eval.sequences", "must be at least 1")
