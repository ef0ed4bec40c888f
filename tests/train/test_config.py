"""Settings: exact names, exact round trip, one line for each mistake."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import (
    PRESETS,
    Config,
    apply_settings,
    flatten,
    from_dict,
    identity,
    preset,
    to_dict,
    with_vocabulary,
)

NAMES = [
    "preset",
    "seed",
    "model.hidden",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "model.head_dim",
    "model.ffn",
    "model.vocab_size",
    "model.quantization",
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "batch.sequences",
    "batch.micro",
    "schedule.warmup_steps",
    "schedule.middle_step",
    "schedule.total_steps",
    "schedule.peak_lr",
    "schedule.middle_lr",
    "schedule.final_lr",
    "schedule.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.clip",
    "checkpoint.every",
    "checkpoint.minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "eval.every",
    "eval.sequences",
    "sample.every",
    "probe.every",
]


def refusal(*given: str, name: str = "95m") -> str:
    with pytest.raises(ValueError) as caught:
        apply_settings(preset(name), given)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_settings_have_exactly_the_documented_names() -> None:
    assert list(flatten(to_dict(preset("95m")))) == NAMES


def test_the_documented_defaults() -> None:
    values = flatten(to_dict(preset("95m")))
    checkpoint = [values[f"checkpoint.{name}"] for name in ("every", "minutes", "keep_last", "keep_every")]
    assert checkpoint == [1000, 10, 3, 10000]
    others = [values[name] for name in ("eval.every", "eval.sequences", "sample.every", "probe.every")]
    assert others == [500, 256, 1000, 100]
    assert values["batch.sequences"] == 32 and values["batch.micro"] is None and values["seed"] == 0


def test_the_identity_is_what_shapes_the_trajectory_and_nothing_else() -> None:
    shaping = [
        name
        for name in NAMES
        if name.partition(".")[0] in ("seed", "model", "schedule", "optimizer") or name == "batch.sequences"
    ]
    assert list(identity(preset("95m"))) == shaping
    other = apply_settings(preset("95m"), ["eval.every=7", "batch.micro=2", "checkpoint.minutes=0", "sample.every=0"])
    assert identity(other) == identity(preset("95m"))
    assert identity(apply_settings(preset("95m"), ["seed=1"])) != identity(preset("95m"))


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_config_survives_json_exactly(name: str) -> None:
    config = apply_settings(preset(name), ["schedule.peak_lr=0.1e-2", "optimizer.eps=3e-17", "batch.micro=4"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@settings(deadline=None)
@given(rate=st.floats(0, 1e3), seed=st.integers(0, 2**63 - 1), every=st.integers(0, 10**9))
def test_any_sensible_value_is_taken_as_written(rate: float, seed: int, every: int) -> None:
    config = apply_settings(preset("95m"), [f"schedule.peak_lr={rate!r}", f"seed={seed}", f"eval.every={every}"])
    assert (config.schedule.peak_lr, config.seed, config.eval.every) == (rate, seed, every)


def test_later_settings_win_and_are_checked_together() -> None:
    config = apply_settings(
        preset("tiny"),
        ["model.hidden=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=32", "model.head_dim=16"],
    )
    assert config.model.head_dim == 16
    assert config.preset == "tiny" and preset("tiny").model.hidden == 256


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("shedule.peak_lr", "schedule.peak_lr"),
        ("peak_lr", "schedule.peak_lr"),
        ("model.hiden", "model.hidden"),
        ("batch.sequence", "batch.sequences"),
        ("quantization", "model.quantization"),
        ("Seed", "seed"),
        ("checkpoint.every_", "checkpoint.every"),
    ],
)
def test_an_unknown_name_is_refused_and_the_nearest_offered(wrong: str, right: str) -> None:
    message = refusal(f"{wrong}=1")
    assert wrong in message and message.endswith(f"did you mean {right}?")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("seed", "name=value"),
        ("seed=x", "seed=x"),
        ("seed=1.5", "whole number"),
        ("seed=-1", "seed=-1"),
        ("seed=9223372036854775808", "2^63"),
        ("schedule.peak_lr=fast", "schedule.peak_lr=fast"),
        ("schedule.peak_lr=nan", "finite"),
        ("schedule.peak_lr=inf", "finite"),
        ("schedule.peak_lr=-1", "schedule.peak_lr=-1"),
        ("schedule.warmup_steps=0", "schedule.warmup_steps=0"),
        ("schedule.middle_step=375", "schedule.middle_step=375"),
        ("schedule.total_steps=30000", "schedule.total_steps=30000"),
        ("model.quantization=int4", "bitnet, none"),
        ("model.kv_heads=5", "model.heads=12"),
        ("model.hidden=770", "model.hidden=770"),
        ("model.head_dim=63", "model.head_dim=63"),
        ("model.vocab_size=65537", "65,536"),
        ("model.layers=0", "model.layers=0"),
        ("batch.sequences=0", "batch.sequences=0"),
        ("batch.micro=5", "batch.sequences=32"),
        ("batch.micro=0", "batch.micro=0"),
        ("optimizer.beta1=1", "optimizer.beta1=1"),
        ("optimizer.eps=0", "optimizer.eps=0"),
        ("optimizer.clip=0", "optimizer.clip=0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0"),
        ("checkpoint.every=-1", "checkpoint.every=-1"),
        ("probe.every=-1", "probe.every=-1"),
        ("eval.sequences=0", "eval.sequences=0"),
        ("preset=tiny", "no setting 'preset'"),
    ],
)
def test_an_impossible_value_is_refused_by_name(setting: str, named: str) -> None:
    assert named in refusal(setting)


def test_an_unknown_preset_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="95m, tiny"):
        preset("7b")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v["model"].pop("ffn"), "model.ffn: missing"),
        (lambda v: v["model"].update(width=3), "model.width: there is no such setting"),
        (lambda v: v["schedule"].update(peak_lr="1e-3"), "schedule.peak_lr"),
        (lambda v: v.update(seed=True), "seed=True"),
        (lambda v: v.update(batch=3), "batch: expected an object"),
        (lambda v: v["model"].update(heads=5), "model."),
    ],
)
def test_a_damaged_stored_config_is_refused_by_name(change: object, named: str) -> None:
    value = to_dict(preset("95m"))
    assert callable(change)
    change(value)
    with pytest.raises(ValueError) as caught:
        from_dict(value)
    assert named in str(caught.value)


def test_95m_takes_its_own_vocabulary_only_and_tiny_any() -> None:
    assert with_vocabulary(preset("95m"), 32_000) == preset("95m")
    with pytest.raises(ValueError, match=r"32000.*31999"):
        with_vocabulary(preset("95m"), 31_999)
    assert with_vocabulary(preset("tiny"), 500).model.vocab_size == 500


def test_the_twin_differs_in_one_setting() -> None:
    twin = apply_settings(preset("95m"), ["model.quantization=none"])
    differing = {name for name, value in identity(twin).items() if value != identity(preset("95m"))[name]}
    assert differing == {"model.quantization"}


def test_a_config_is_frozen() -> None:
    config: Config = preset("95m")
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
