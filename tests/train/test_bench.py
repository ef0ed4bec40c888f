"""What `train bench` prints: the baseline is the same network, the numbers follow from the clock and each other."""

import json
import re
import statistics
from dataclasses import replace

import pytest
import torch

from tests.train.command import TINY, Command
from train import bench
from train.bench import LENGTH, Candidate, Timed, measure, ours, summary, table, textbook
from train.config import ModelConfig, apply_settings, preset
from train.kernels import GROUPS, group_of, kernel_group
from train.model import Model
from train.runtime import Runtime, flops_per_token
from train.textbook import Textbook

CPU = torch.device("cpu")
FP32 = Runtime(device="cpu", precision="fp32", threads=1, micro=2, compile=False, deterministic=True, world_size=1)
SMALL = ModelConfig(hidden=96, layers=2, heads=6, kv_heads=3, head_dim=16, ffn=160, vocab_size=211, init_std=0.1)


def test_the_textbook_is_the_same_network() -> None:
    ours, theirs = Model(SMALL, torch.float64), Textbook(SMALL).double()
    ours.initialise(0)
    ours.double().requantize()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 211, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = [model.loss(ids[:, :-1], ids[:, 1:]) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_by_name[name].grad, rtol=1e-7, atol=1e-10, msg=name)


def test_rounds_go_around_and_the_first_two_are_not_counted() -> None:
    now, calls = [0.0], []

    def takes(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds + (100 if len(calls) <= 8 else 0)  # warming up is slow

    candidates = [
        Candidate(name, lambda n=name, s=s: takes(n, s), lambda n=name, s=s: takes(n + "'s update", s / 2), list)
        for name, s in (("a", 1.0), ("b", 3.0))
    ]
    timed = measure(candidates, 3, CPU, lambda: now[0])
    assert calls == ["a", "a's update", "b", "b's update"] * 5
    assert timed == {"a": Timed([1.0] * 3, [0.5] * 3, None), "b": Timed([3.0] * 3, [1.5] * 3, None)}


def runs_out() -> None:
    raise torch.OutOfMemoryError("no more")


def test_what_runs_out_of_memory_is_left_out_and_the_rest_is_measured() -> None:
    fits, does_not = (
        Candidate(name, work, lambda: None, list) for name, work in (("a", lambda: None), ("b", runs_out))
    )
    assert list(measure([fits, does_not], 2, CPU)) == ["a"]
    with pytest.raises(ValueError, match=r"b runs out of memory .* give --set batch\.micro="):
        measure([does_not, fits], 2, CPU)


@pytest.mark.parametrize("kind", ["bitnet", "none", "textbook"])
def test_what_a_candidate_holds_is_every_byte_that_stays(kind: str) -> None:
    config, ids = replace(preset("tiny"), model=SMALL), torch.zeros(2, 9, dtype=torch.int64)
    if kind == "textbook":
        candidate = textbook(config, torch.float32, ids, ids)
    else:
        candidate = ours("x", config, kind, FP32, ids, ids)
    candidate.micro_batch()
    candidate.update()
    parameters = sum(p.numel() for p in Model(SMALL).parameters())
    matrices = sum(linear.weight.numel() for linear in Model(SMALL).bitlinears())
    rows = sum(len(linear.weight) for linear in Model(SMALL).bitlinears())
    derived = (1 + 4) * matrices + 4 * rows if kind == "bitnet" else 0  # codes in int8, and quantised in fp32
    counts = len(list(Model(SMALL).parameters()))  # of AdamW's steps
    assert sum(t.nbytes for t in candidate.holds()) == 16 * parameters + 4 * counts + derived


def test_numbers_follow_from_the_seconds() -> None:
    config = apply_settings(preset("95m"), ["batch.sequences=8"])
    timed = {"x": Timed([1.0, 2.0, 9.0], [0.5, 0.5, 0.5], 7), "y": Timed([2.0, 6.0, 9.0], [0.5] * 3, None)}
    found = summary(config, FP32, CPU, timed)
    x, y = found["results"]["x"], found["results"]["y"]
    assert x["step_ms"] == (4 * 2.0 + 0.5) * 1e3, "8 sequences, 2 at a time; the median round"
    assert x["tokens_per_second"] == 8 * LENGTH / 8.5
    assert (x["micro_batch_ms"], x["update_ms"], x["memory_bytes"], x["mfu"]) == (2000.0, 500.0, 7, None)
    assert x["flops_per_second"] == x["tokens_per_second"] * flops_per_token(config.model, LENGTH)
    assert x["speed_of_first"] == 1.0
    assert y["speed_of_first"] == statistics.median([8.5 / 4.5, 24.5 / 8.5, 1.0]), "of rounds, not of medians"


def test_an_mfu_is_a_share_of_the_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("95m")
    monkeypatch.setattr(bench.runtime, "peak_flops", lambda device: 1e12)
    (result,) = summary(config, FP32, CPU, {"x": Timed([1.0], [0.0], None)})["results"].values()
    assert result["mfu"] == pytest.approx(2 * LENGTH * 647_626_752 / 1e12)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::_int_mm", "QuantizedProduct"], "products forward"),
        (["aten::mm", "QuantizedProductBackward", "evaluate_function"], "products backward"),
        (["aten::mm", "ChunkedCrossEntropy"], "head and loss"),
        (["aten::copy_", "aten::to", "ChunkedCrossEntropy"], "head and loss"),
        (["aten::mul", "SwiGLUNormBackward"], "norm, quantise, RoPE"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention"], "attention"),
        (["aten::add"], "rest"),
    ],
)
def test_an_operation_counts_where_it_belongs(names: list[str], group: str) -> None:
    assert group_of(names) == group


def test_kernels_of_a_gpu_are_known_by_name() -> None:
    assert kernel_group("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT") == "products forward"
    assert kernel_group("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel") == "attention"
    assert kernel_group("triton_red_fused__to_copy_abs_amax_clamp_0") == "norm, quantise, RoPE"
    assert kernel_group("triton_red_fused__softmax_amax_0") == "head and loss"


SETTINGS = [f"--set={name}={value}" for name, value in {**TINY, "model.vocab_size": 500, "batch.sequences": 4}.items()]


def test_a_bench_is_one_json_object_whose_numbers_agree(train: Command) -> None:
    done = train("bench", "--preset", "tiny", "--device", "cpu", "--rounds", 1, "--json", *SETTINGS)
    assert (done.code, done.out.count("\n")) == (0, 1)
    assert all(line.startswith("USDT:") for line in done.err.splitlines()), "which some builds of torch's profiler say"
    found = json.loads(done.out)
    names = list(found["results"])
    assert names[:2] == ["BitNet", "twin"] and names[-1] == "textbook, fp32"
    assert (found["sequences"], found["micro"], found["rounds"], found["device"]) == (4, 2, 1, "cpu")
    for result in found["results"].values():
        step = 2 * result["micro_batch_ms"] + result["update_ms"]
        assert result["step_ms"] == pytest.approx(step)
        assert result["tokens_per_second"] == pytest.approx(4 * 1024 / (step / 1e3))
        first = found["results"]["BitNet"]
        assert result["speed_of_first"] == pytest.approx(result["step_ms"] / first["step_ms"])
    shares = found["kernels"]
    assert tuple(shares) == GROUPS and sum(shares.values()) == pytest.approx(1)
    assert min(share for group, share in shares.items() if group != "rest") > 0
    lines = list(table(found))
    for name, result in found["results"].items():
        (line,) = [line for line in lines if line.startswith(f"{name}  ")]
        assert f"{result['tokens_per_second']:,.0f}" in re.split(r"\s{2,}", line)
        assert line.endswith(f"{result['speed_of_first']:.2f}x")


def test_a_bench_of_a_missing_device_is_refused_in_a_line(train: Command) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = train("bench", "--device", "cuda")
    assert done.code == 1 and done.err.count("\n") == 1 and "--device cuda" in done.err and not done.out
