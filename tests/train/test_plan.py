"""The plan of a job: its numbers are those of the paper's table, of the real model, and of the real checkpoint."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.command import ROOT, TINY, Command
from tests.train.fake_device import fake_device
from train.config import Config, apply_settings, flatten, preset, to_dict
from train.plan import CARDS, LENGTH, memory_of, plan, table
from train.runtime import Runtime, fit_micro, ladder

GPU = Runtime(device="fake", precision="bf16", threads=1, micro=None, compile=False, deterministic=True, world_size=1)


def test_the_95m_job_is_the_one_that_was_promised() -> None:
    p = plan(preset("95m"))
    assert p.parameters.total == 95_367_936 == 24_576_000 + 8 * 8_848_896 + 768
    assert (p.parameters.embedding, p.parameters.layers, p.parameters.layer) == (24_576_000, 8, 8_848_896)
    assert (p.parameters.attention, p.parameters.ffn, p.parameters.final_norm) == (1_770_240, 7_078_656, 768)
    assert p.tokens == 1_966_080_000 == 60_000 * 32 * 1_024
    assert p.sequences == 1_920_000
    assert round(p.tokens_per_parameter, 1) == 20.6
    assert p.flops_per_token == 647_626_752
    assert p.flops == 647_626_752 * 1_966_080_000 and 1.27e18 < p.flops < 1.28e18


def test_the_schedule_stands_at_the_steps_where_it_turns() -> None:
    found = [(k.step, k.lr, k.weight_decay) for k in plan(preset("95m")).schedule]
    assert [(n, float(f"{lr:.7g}"), decay) for n, lr, decay in found] == [
        (1, 4e-6, 0.1),
        (375, 1.5e-3, 0.1),
        (376, 1.499983e-3, 0.1),
        (30_000, 1e-3, 0.1),
        (30_001, 9.999672e-4, 0.0),
        (60_000, 1.5e-5, 0.0),
    ]


def test_the_twin_is_the_same_job_with_fewer_derived_bytes() -> None:
    bitnet, twin = (plan(apply_settings(preset("95m"), [f"model.quantization={q}"])) for q in ("bitnet", "none"))
    assert (bitnet.parameters, bitnet.tokens, bitnet.schedule) == (twin.parameters, twin.tokens, twin.schedule)
    assert [a.total - b.total for a, b in zip(bitnet.memory, twin.memory, strict=True)] == [2 * 70_778_880] * 6


def test_time_is_tokens_by_speed() -> None:
    found = plan(preset("95m"), speed=500_000.0).time
    assert found and found.seconds == 1_966_080_000 / 500_000
    assert plan(preset("95m")).time is None


@pytest.mark.parametrize("quantization", ["bitnet", "none"])
def test_memory_is_what_a_device_that_counts_has_seen(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = apply_settings(preset("95m"), [f"model.quantization={quantization}"])
    with fake_device(config, LENGTH, 10**12, monkeypatch) as device:
        for micro in (1, 8, 32):
            assert memory_of(config.model, LENGTH, micro).total == pytest.approx(device.peak(micro), rel=0.02)


@pytest.mark.parametrize("card", CARDS)
def test_the_ladder_finds_the_planned_rung_on_every_card_without_a_crash(
    card: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preset("95m")
    with fake_device(config, LENGTH, card * 10**9, monkeypatch) as device:
        fixed = device.allocator.live
        chosen = fit_micro(GPU, ladder(config.batch.sequences, "cuda"), device.attempt)
        assert chosen == replace(GPU, micro=plan(config).fits[card])
        assert device.allocator.live < fixed + 10**7, "what a failed attempt held is free again"
        device.attempt(chosen.micro or 0)


def test_a_card_that_is_too_small_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        fake_device(preset("95m"), LENGTH, 2 * 10**9, monkeypatch) as device,
        pytest.raises(ValueError, match="out of memory with 1 sequence"),
    ):
        fit_micro(GPU, [2, 1], device.attempt)


def test_a_given_micro_batch_is_the_only_one_planned() -> None:
    found = plan(apply_settings(preset("95m"), ["batch.micro=16"]))
    assert [m.micro for m in found.memory] == [16]
    assert found.fits == {8: None, 16: 16, 24: 16, 80: 16}


def small(**more: object) -> tuple[list[str], Config]:
    settings = [f"{name}={value}" for name, value in {**TINY, **more}.items()]
    return [f"--set={s}" for s in settings], apply_settings(preset("tiny"), settings)


def test_disk_is_what_a_run_leaves(train: Command, data: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"checkpoint.every": 2, "checkpoint.keep_last": 2, "checkpoint.keep_every": 10}
    options, _ = small(**settings)
    planned = json.loads(train("plan", "--preset", "tiny", "--data", data, "--json", *options).out)["disk"]
    run = tmp_path / "run"
    assert train.run(data, run, settings=settings).code == 0
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-00000010", "step-00000020", "step-00000022", "step-00000024"]
    assert planned["most"] == len(left) + 1, "and one more while the last was written"
    sizes = {sum(f.stat().st_size for f in (run / "checkpoints" / name).iterdir()) for name in left}
    assert all(planned["checkpoint"] <= size < planned["checkpoint"] + 100_000 for size in sizes)
    assert planned["total"] == planned["most"] * planned["checkpoint"]


def test_a_plan_needs_neither_data_nor_a_run(train: Command) -> None:
    done = train("plan")
    assert (done.code, done.err) == (0, "")
    for words in ("95,367,936", "1,966,080,000", "20.6 a parameter", "647.6 MFLOP", "1.499983e-03", "24 GB: 32"):
        assert words in done.out
    as_json = train("plan", "--json", "--speed", 1000)
    assert as_json.out.count("\n") == 1
    assert json.loads(as_json.out)["parameters"]["total"] == 95_367_936
    assert json.loads(as_json.out)["data"] is None


def test_a_named_data_set_is_verified_and_measured(train: Command, data: Path) -> None:
    options, _ = small()
    done = train("plan", "--preset", "tiny", "--data", data, "--json", *options)
    found = json.loads(done.out)
    assert (done.code, done.err, found["sequence_length"]) == (0, "", 32)
    manifest = json.loads((data / "manifest.json").read_text())
    want = {"id": manifest["id"], "vocab_size": 1000, "sequences": 120, "val_sequences": 10, "enough": True}
    assert found["data"] == want
    assert manifest["id"] in train("plan", "--preset", "tiny", "--data", data, *options).out


def test_a_data_set_that_does_not_last_fails_with_both_numbers(train: Command, data: Path) -> None:
    done = train("plan", "--preset", "tiny", "--data", data)
    assert done.code == 1
    assert "120 train sequences for the 2,400 of the schedule: 2,280 too few" in done.out
    assert "takes 2400 sequences and the train split has 120" in done.err and "--steps 15 or less" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "DATA"], "model.vocab_size is 32000 (preset 95m) and the data set has 1000 ids"),
        (["--preset", "tiny"], "name one with --data DIR"),
        (["--preset", "huge"], "95m, tiny"),
        (["--set", "batch.sequence=8"], "did you mean batch.sequences"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(train: Command, data: Path, args: list[str], words: str) -> None:
    done = train("plan", *[str(data) if arg == "DATA" else arg for arg in args])
    assert done.code == 1 and words in done.err and done.err.count("\n") == 1 and not done.out


def test_a_damaged_data_set_is_named(train: Command, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = copy / "train" / "00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = train("plan", "--preset", "tiny", "--data", copy, *small()[0])
    assert done.code == 1 and str(shard) in done.err and not done.out


def test_the_document_shows_this_very_plan() -> None:
    assert "\n".join(table(plan(preset("95m")))) in (ROOT / "train" / "README.md").read_text()


def test_the_document_lists_every_setting_with_its_value() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (\S+) \| .+ \|$", (ROOT / "train" / "README.md").read_text(), re.M)
    values = {k: str(v).lower() for k, v in flatten(to_dict(preset("95m"))).items() if k != "preset"}
    assert dict(rows) == values
