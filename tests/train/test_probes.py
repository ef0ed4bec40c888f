"""A probe's numbers are what their names say, by other means, and taking them changes nothing in a run."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.manifest import load_manifest, open_stream
from tests.train import test_model
from tests.train.command import TINY, Command
from tests.train.same_bytes import LOGS, contents, without_timing
from train import bitlinear, runtime
from train.config import Config, ModelConfig, apply_settings
from train.loop import Loop
from train.metrics import read
from train.model import Model
from train.order import Order, rows
from train.probes import activations
from train.run_folder import RunFolder

STEPS, SKIPPED, CLIP = 8, 5, 0.5
PROBED = {"probe.every": 1, "checkpoint.every": 1, "model.layers": 2}
PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]
OF_CODES = {"minus", "zero", "plus", "flipped", "scale", "saturated"}
OF_ALL = {"absmax", "weight_norm", "update_norm", "grad_norm"}

Probed = dict[tuple[int, str], dict[str, float]]  # by layer and projection


def probes(run: Path) -> dict[int, Probed]:
    """The probe lines of a run by step."""
    lines = [line for line in read(run / "metrics.jsonl") if line["kind"] == "probe"]
    assert all(set(line) == {"kind", "step", "layers", "timing"} for line in lines)
    return {line["step"]: {(each["layer"], each["projection"]): each for each in line["layers"]} for line in lines}


def checkpoint(run: Path, step: int, file: str = "model") -> dict[str, np.ndarray[Any, Any]]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def parts(tensors: dict[str, np.ndarray[Any, Any]], prefix: str = "") -> dict[tuple[int, str], np.ndarray[Any, Any]]:
    """Fused weights, or what has their shape, cut into projections."""
    found = {}
    heads, keys, ffn = (int(str(TINY[f"model.{name}"])) for name in ("heads", "kv_heads", "ffn"))
    queries = heads * 8
    keys *= 8
    for layer in (0, 1):
        q, k, v = np.split(tensors[f"{prefix}layers.{layer}.attention.qkv.weight"], [queries, queries + keys])
        gate, up = np.split(tensors[f"{prefix}layers.{layer}.ffn.gate_up.weight"], [ffn])
        o = tensors[f"{prefix}layers.{layer}.attention.output.weight"]
        down = tensors[f"{prefix}layers.{layer}.ffn.down.weight"]
        found |= {(layer, name): w for name, w in zip(PROJECTIONS, (q, k, v, o, gate, up, down), strict=True)}
    return found


def ternary(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The paper's formula; half to even."""
    scale = torch.from_numpy(weight).abs().mean().clamp(min=1e-5).numpy()  # in torch's order of adding
    return np.clip(np.round(weight * (np.float32(1) / scale)), -1, 1)


@pytest.fixture(scope="module")
def run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every step probed and saved; one made no update."""
    run = tmp_path_factory.mktemp("probes") / "run"
    quick = {"schedule.warmup_steps": 1, "schedule.peak_lr": 0.02, "optimizer.clip": CLIP}  # codes flip, clips are met
    done = train.run(
        data, run, "--steps", STEPS, settings={**PROBED, **quick}, faults=[("poison", SKIPPED), ("precision", "fp32")]
    )
    assert (done.code, done.err) == (0, "")
    return run


def test_every_projection_of_every_layer_is_there_under_its_documented_names(run: Path) -> None:
    assert list(probes(run)) == list(range(1, STEPS + 1))
    for found in probes(run).values():
        assert list(found) == [(layer, name) for layer in (0, 1) for name in PROJECTIONS]
        assert all(set(each) == {"layer", "projection"} | OF_CODES | OF_ALL for each in found.values())


def test_codes_scales_and_norms_are_those_of_the_checkpoints(run: Path) -> None:
    for step in range(2, STEPS + 1):
        before, after = parts(checkpoint(run, step - 1)), parts(checkpoint(run, step))
        for place, found in probes(run)[step].items():
            codes, weight = ternary(after[place]), after[place]
            shares = [np.mean(codes == -1), np.mean(codes == 0), np.mean(codes == 1)]
            assert [found["minus"], found["zero"], found["plus"]] == pytest.approx(shares, abs=1e-7)
            assert found["flipped"] == pytest.approx(np.mean(codes != ternary(before[place])), abs=1e-7)
            assert found["scale"] == pytest.approx(np.abs(weight).mean(), rel=1e-5)
            assert found["weight_norm"] == pytest.approx(np.linalg.norm(weight), rel=1e-5)
            assert found["update_norm"] == pytest.approx(np.linalg.norm(weight - before[place]), rel=1e-5)
    assert sum(each["flipped"] > 0 for found in probes(run).values() for each in found.values()) > 20, "nothing flipped"


def test_gradient_norms_are_those_before_the_clip(run: Path) -> None:
    """The gradients that AdamW saw stand in its first moment: m(n) = 0.9 m(n-1) + 0.1 g / clip."""
    lines = {line["step"]: line for line in read(run / "metrics.jsonl") if line["kind"] == "train"}
    clipped = 0
    for step in range(2, STEPS + 1):
        if step == SKIPPED:
            continue
        moments = [parts(checkpoint(run, n, "optimizer"), "exp_avg.") for n in (step - 1, step)]
        norm = lines[step]["grad_norm"]
        clipped += norm > CLIP
        for place, found in probes(run)[step].items():
            seen = np.linalg.norm((moments[1][place] - 0.9 * moments[0][place]) / 0.1) * max(1, norm / CLIP)
            assert found["grad_norm"] == pytest.approx(seen, rel=1e-3)
        assert sum(each["grad_norm"] ** 2 for each in probes(run)[step].values()) < norm**2
    assert clipped > 4, "the clip must be met"


def test_a_step_without_an_update_flips_nothing_and_its_gradients_are_null(run: Path) -> None:
    for each in probes(run)[SKIPPED].values():
        assert (each["flipped"], each["update_norm"], each["grad_norm"]) == (0, 0, None)
        assert each["zero"] > 0 and each["absmax"] > 0


def batch(run: Path, data: Path, step: int) -> Tensor:
    """The inputs of the first sequence of a step, (1, T)."""
    manifest = load_manifest(data)
    order = Order(manifest.id, 0, manifest.splits["train"].sequences, int(str(TINY["batch.sequences"])))
    return torch.from_numpy(rows(open_stream(data, manifest, "train"), order.indices(step)[:1], 32))[:, :-1]


def test_activations_are_those_of_the_checkpoint_on_the_first_sequence_of_the_batch(run: Path, data: Path) -> None:
    runtime.prepare(RunFolder(run).facts().runtime)
    for step in (1, SKIPPED, STEPS):
        model = Model(RunFolder(run).facts().config.model)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in checkpoint(run, step).items()})
        model.requantize()
        seen = activations(model, batch(run, data, step))
        linears = [block.get_submodule(name) for block in model.layers for name in
                   3 * ["attention.qkv"] + ["attention.output"] + 2 * ["ffn.gate_up"] + ["ffn.down"]]  # fmt: skip
        for each, linear in zip(probes(run)[step].values(), linears, strict=True):
            assert each["absmax"] == seen[linear]["absmax"].item()
            assert each["saturated"] == seen[linear]["saturated"].item()


def test_activations_are_those_of_transformers_bitnet(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[nn.Module, tuple[float, float]] = {}

    class Watched(test_model.TextbookLinear):
        def forward(self, x: Tensor) -> Tensor:
            largest = x.abs().amax(-1, keepdim=True)
            seen[self] = (largest.mean().item(), ((x * 127 / largest).round().abs() == 127).double().mean().item())
            return super().forward(x)

    model = test_model.made(compute=torch.float64)
    ids = test_model.tokens(2, 20)
    with torch.no_grad():
        reference = test_model.transformers_bitnet(model, monkeypatch, Watched)
        reference(ids)
    ours = activations(model, ids)
    for layer, theirs in zip(model.layers, reference.model.layers, strict=True):
        for name, names in {
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.output": ("self_attn.o_proj",),
            "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "ffn.down": ("mlp.down_proj",),
        }.items():
            found = ours[layer.get_submodule(name)]
            for other in names:
                absmax, saturated = seen[theirs.get_submodule(other)]
                assert found["absmax"].item() == pytest.approx(absmax, rel=1e-6)
                assert found["saturated"].item() == pytest.approx(saturated, rel=1e-6)


def test_the_twin_has_norms_and_activations_and_no_shares(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "twin"
    assert train.run(data, run, "--steps", 2, settings={**PROBED, "model.quantization": "none"}).code == 0
    before, after = (parts(checkpoint(run, step)) for step in (1, 2))
    assert list(probes(run)[2]) == [(layer, name) for layer in (0, 1) for name in PROJECTIONS]
    for place, found in probes(run)[2].items():
        assert set(found) == {"layer", "projection"} | OF_ALL
        assert found["weight_norm"] == pytest.approx(np.linalg.norm(after[place]), rel=1e-5)
        assert found["update_norm"] == pytest.approx(np.linalg.norm(after[place] - before[place]), rel=1e-5)
        assert found["absmax"] > 0 and found["grad_norm"] > 0


@pytest.mark.parametrize(("quantization", "precision"), [("bitnet", "bf16"), ("bitnet", "fp32"), ("none", "fp32")])
def test_probing_changes_nothing_in_the_trajectory(
    train: Command, data: Path, tmp_path: Path, precision: str, quantization: str
) -> None:
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    # Every step draws from the global generator: a probe that did so would show.
    faults, found = [("precision", precision), ("draw",), ("poison", 7)], []
    for every in (0, 1):
        run, settings = tmp_path / str(every), {**PROBED, "probe.every": every, "model.quantization": quantization}
        done = train.run(data, run, "--steps", 12, settings=settings, faults=faults)
        assert (done.code, done.err) == (0, "")
        assert RunFolder(run).facts().runtime.precision == precision
        assert len(probes(run)) == 12 * every
        lines = [line for log in LOGS for line in without_timing(run / log) if line.get("kind") != "probe"]
        found.append((lines, contents(run / "checkpoints")))
    assert len(found[0][1]) == 12 * 4
    assert found[0] == found[1]


def config(probe_every: int) -> Config:
    sizes = ModelConfig(hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab_size=1000)
    return apply_settings(Config("test", model=sizes), [f"probe.every={probe_every}", "batch.sequences=4"])


def made(data: Path, probe_every: int) -> Loop:
    torch.set_num_threads(1)
    manifest, chosen = load_manifest(data), config(probe_every)
    model = Model(chosen.model)
    model.initialise(0)
    order = Order(manifest.id, 0, manifest.splits["train"].sequences, 4)
    return Loop(chosen, model, order, open_stream(data, manifest, "train"), length=32, micro=2)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces and runs its graphs without generating code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_what_is_compiled_is_neither_changed_nor_compiled_anew(data: Path, compiling: None) -> None:
    plain, probed = made(data, 0), made(data, 2)
    for loop in (plain, probed):
        runtime.compile_model(loop.model)
    graphs = []
    for n in range(1, 6):
        expected, found = plain.step(n), probed.step(n)
        assert found.loss.equal(expected.loss) and found.grad_norm.equal(expected.grad_norm)
        assert (found.probe is not None) == (n % 2 == 0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1, graphs
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in probed.model.modules())
    assert all(t.equal(probed.model_state()[name]) for name, t in plain.model_state().items())


def test_a_probe_that_fails_leaves_no_hook_behind(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = made(data, 0)
    monkeypatch.setattr("train.probes.quantize_activations", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        activations(loop.model, torch.ones(1, 8, dtype=torch.int64))
    assert not any(module._forward_pre_hooks for module in loop.model.modules())


def test_a_step_with_a_probe_never_waits_for_the_device(data: Path) -> None:
    """A fake tensor has no value: who asks for one, as .item() does, fails."""
    bitlinear.int8_is_exact()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Model(config(1).model, torch.bfloat16)
        model.requantize()
        stream: Any = np.zeros(4 * 32 + 1, dtype=np.uint16)
        measured = Loop(config(1), model, Order("0" * 64, 0, 4, 4), stream, length=32, micro=2).step(1)
        assert measured.probe is not None
        with pytest.raises(RuntimeError):
            measured.probe.layers()
