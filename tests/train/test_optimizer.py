"""AdamW against its formula, the clip, the skipped step, and state that comes back bit for bit."""

import math

import pytest
import torch
from torch import Tensor

from train.config import ModelConfig, OptimizerConfig
from train.model import Model
from train.optimizer import AdamW, decay_groups

SMALL = ModelConfig(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=48, vocab_size=61)
HEALTHY = torch.tensor(True)


def made(**settings: float) -> tuple[Model, AdamW]:
    model = Model(SMALL)
    model.initialise(0)
    return model, AdamW(model, OptimizerConfig(**settings))


def fill_gradients(model: Model, n: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(n)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * size


def bits(model: Model, optimizer: AdamW) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *optimizer.state_dict().items()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_updates_follow_the_formula() -> None:
    model, optimizer = made(beta1=0.8, beta2=0.9, eps=1e-6, clip=1.0)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    decayed, _ = decay_groups(model)
    for n, (lr, decay, size) in enumerate([(1e-2, 0.1, 1.0), (2e-2, 0.1, 1e-4), (5e-3, 0.0, 3.0), (1e-3, 0.3, 1.0)], 1):
        fill_gradients(model, n, size)
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert optimizer.gradient_norm().item() == pytest.approx(norm, rel=1e-6)
        optimizer.step(lr, decay, optimizer.gradient_norm(), HEALTHY)
        for name, w in weights.items():
            g = gradients[name] / max(1.0, norm / 1.0)
            w *= 1 - lr * (decay if name in decayed else 0.0)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            w -= lr * (m[name] / (1 - 0.8**n)) / ((v[name] / (1 - 0.9**n)).sqrt() + 1e-6)
            torch.testing.assert_close(model.get_parameter(name).double(), w, rtol=2e-5, atol=2e-7, msg=name)


def test_matrices_decay_and_norms_and_embedding_do_not() -> None:
    model, optimizer = made()
    decayed, plain = decay_groups(model)
    assert sorted(decayed) == [
        f"layers.0.{n}.weight" for n in ("attention.output", "attention.qkv", "ffn.down", "ffn.gate_up")
    ]
    assert set(plain) == {"embedding", "norm.weight", "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"}
    assert sorted(decayed + plain) == sorted(name for name, _ in model.named_parameters())
    before = bits(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1, 0.5, optimizer.gradient_norm(), HEALTHY)
    for name, p in model.named_parameters():
        want = before[name] * (1 - 0.1 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=0)
        assert name in decayed or torch.equal(p, want)


def test_the_clip_bounds_the_whole_gradient_and_changes_no_bit_below_it() -> None:
    results = []
    for clip in (1.0, 1e9):
        model, optimizer = made(clip=clip)
        fill_gradients(model, 1, size=1e-3)
        assert optimizer.gradient_norm() < 1
        optimizer.step(1e-3, 0.1, optimizer.gradient_norm(), HEALTHY)
        results.append(bits(model, optimizer))
    assert same(*results)
    model, optimizer = made(clip=0.5)
    fill_gradients(model, 1)
    optimizer.step(1e-3, 0.1, optimizer.gradient_norm(), HEALTHY)
    first = torch.cat([t.flatten() for t in optimizer.exp_avg.values()]) / (1 - 0.9)
    assert first.norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_unhealthy_step_changes_no_bit_of_weights_moments_or_counts(poison: float) -> None:
    model, optimizer = made()
    other_model, other = made()
    for n in (1, 2, 3):
        fill_gradients(model, n)
        if n == 2:
            gradient = model.layers[0].ffn.down.weight.grad
            assert isinstance(gradient, Tensor)
            gradient[3, 5] = poison
        norm = optimizer.gradient_norm()
        before = bits(model, optimizer)
        optimizer.step(1e-2, 0.1, norm, norm.isfinite())
        assert same(bits(model, optimizer), before) == (n == 2)
        if n != 2:
            fill_gradients(other_model, n)
            other.step(1e-2, 0.1, other.gradient_norm(), HEALTHY)
    assert same(bits(model, optimizer), bits(other_model, other)), "as if the bad step had never been"


def test_a_step_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    fill_gradients(model, 1)

    def asked(*_: object) -> None:
        raise AssertionError("a number was read back: on a GPU that stalls the queue")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, asked)
    norm = optimizer.gradient_norm()
    optimizer.step(1e-3, 0.1, norm, norm.isfinite())


@pytest.mark.parametrize("k", [0, 1, 3])
def test_state_comes_back_bit_for_bit(k: int) -> None:
    model, optimizer = made()
    for n in range(1, k + 1):
        fill_gradients(model, n)
        optimizer.step(1e-2, 0.1, optimizer.gradient_norm(), HEALTHY)
    saved, weights = optimizer.state_dict(), model.state_dict()
    saved, weights = ({name: t.clone() for name, t in state.items()} for state in (saved, weights))
    other_model, other = made()
    other_model.load_state_dict(weights)
    other.load_state_dict(saved)
    assert same(bits(model, optimizer), bits(other_model, other))
    for n in range(k + 1, k + 4):
        for pair in ((model, optimizer), (other_model, other)):
            fill_gradients(pair[0], n)
            pair[1].step(1e-2, 0.1, pair[1].gradient_norm(), HEALTHY)
    assert same(bits(model, optimizer), bits(other_model, other))


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "step"])
def test_each_piece_of_state_matters(kind: str) -> None:
    ends = []
    for spoiled in (False, True):
        model, optimizer = made()
        fill_gradients(model, 1)
        optimizer.step(1e-2, 0.1, optimizer.gradient_norm(), HEALTHY)
        if spoiled:
            optimizer.state_dict()[f"{kind}.norm.weight"].zero_()
        fill_gradients(model, 2)
        optimizer.step(1e-2, 0.1, optimizer.gradient_norm(), HEALTHY)
        ends.append(bits(model, optimizer)["norm.weight"])
    assert not torch.equal(*ends)


def test_state_of_another_model_is_refused_by_name() -> None:
    _, optimizer = made()
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"exp_avg\.embedding is missing"):
        optimizer.load_state_dict({name: t for name, t in state.items() if name != "exp_avg.embedding"})
    with pytest.raises(ValueError, match=r"exp_avg\.zzz is in the file only"):
        optimizer.load_state_dict({**state, "exp_avg.zzz": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"exp_avg\.embedding has another shape"):
        optimizer.load_state_dict({**state, "exp_avg.embedding": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"exp_avg\.embedding has another"):
        optimizer.load_state_dict({**state, "exp_avg.embedding": state["exp_avg.embedding"].double()})


def test_weights_that_are_not_fp32_are_ours_to_prevent() -> None:
    with pytest.raises(AssertionError, match="fp32"):
        AdamW(Model(SMALL).bfloat16(), OptimizerConfig())
