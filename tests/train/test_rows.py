"""What happens to each token alone, against the plain formulas and their autograd in fp64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train import cross_entropy, rows
from train.config import ModelConfig
from train.cross_entropy import softmax_slope
from train.model import Attention, attention_dtype, rotary
from train.rows import by_rows, rms_norm, rotate, swiglu_norm

EPS = 1e-5
Function = Callable[[Tensor], Tensor]


def plain_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def plain_swiglu_norm(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return plain_norm(F.silu(gate) * up)


def angles(count: int, dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotary(torch.arange(count), dim, 10_000.0)
    return cos.double(), sin.double()


def plain_rotate(x: Tensor) -> Tensor:
    """The first 2 of 3 heads of 4 features, as complex numbers."""
    cos, sin = angles(len(x), 4)
    heads = x.unflatten(-1, (3, 4))
    pairs = torch.complex(heads[:, :2, :2], heads[:, :2, 2:]) * torch.complex(cos, sin)[:, None]
    return torch.cat((torch.cat((pairs.real, pairs.imag), -1), heads[:, 2:]), 1).flatten(1)


def rotated(x: Tensor) -> Tensor:
    return rotate(x.unflatten(-1, (3, 4)), angles(len(x), 4), 2, x.dtype).flatten(1)


PAIRS = [
    (lambda x: rms_norm(x, EPS), plain_norm),
    (lambda x: swiglu_norm(x, EPS), plain_swiglu_norm),
    (rotated, plain_rotate),
]


def value_and_gradient(function: Function, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y))
    return y.detach(), gradient


@pytest.mark.parametrize(("function", "plain"), PAIRS, ids=["norm", "swiglu", "rotate"])
@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 40), at_once=st.integers(1, 9), power=st.integers(-6, 6), seed=st.integers(0, 99))
def test_each_function_and_its_gradient_are_the_formula_in_fp64(
    function: Function, plain: Function, m: int, at_once: int, power: int, seed: int
) -> None:
    x = torch.randn(m, 12, generator=torch.Generator().manual_seed(seed)).double() * 2.0**power
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "rows_at_once", lambda x: at_once)
        got = value_and_gradient(function, x, seed)
    torch.testing.assert_close(got, value_and_gradient(plain, x, seed), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("function", "plain"), PAIRS, ids=["norm", "swiglu", "rotate"])
def test_how_many_rows_a_cpu_takes_at_once_changes_no_bit(
    function: Function, plain: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(300, 12).bfloat16()
    found = []
    for at_once in (1, 7, 64, 1000):
        monkeypatch.setattr(rows, "rows_at_once", lambda x, at_once=at_once: at_once)
        found.append(value_and_gradient(function, x, 1))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_cpu_takes_a_cache_full_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def seen(x: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(x))
        return x, x[:, :1].int()

    x, threads = torch.arange(600.0).view(200, 3), torch.get_num_threads()
    monkeypatch.setattr(rows, "CACHE", 40 * 3 * 4)
    try:
        torch.set_num_threads(2)
        whole = by_rows(seen, x)
    finally:
        torch.set_num_threads(threads)
    assert sizes == [80, 80, 40]
    assert torch.equal(whole[0], x) and torch.equal(whole[1], x[:, :1].int()) and whole[1].dtype == torch.int32
    assert [len(part) for part in by_rows(seen, x[:0])] == [0, 0]


@pytest.mark.parametrize(("function", "plain"), PAIRS[:2], ids=["norm", "swiglu"])
def test_bf16_inputs_are_worked_on_in_fp32(function: Function, plain: Function) -> None:
    x = torch.randn(64, 256).bfloat16()
    want, want_gradient = value_and_gradient(plain, x.double(), 1)
    y, gradient = value_and_gradient(function, x, 1)
    assert y.dtype == torch.float32 and (y - want).norm() < 1e-6 * want.norm()
    assert gradient.dtype == torch.bfloat16 and (gradient - want_gradient).norm() < 3e-3 * want_gradient.norm()
    rounded_on_the_way = plain(x).double()
    assert (rounded_on_the_way - want).norm() > 1e-3 * want.norm(), "in bf16 it would not be"


@pytest.mark.parametrize("turned", [0, 1, 3])
def test_turning_back_gives_the_same_heads_and_the_others_are_never_touched(turned: int) -> None:
    x, (cos, sin) = torch.randn(50, 3, 8).double(), angles(50, 8)
    there = rotate(x, (cos, sin), turned, x.dtype)
    torch.testing.assert_close(rotate(there, (cos, -sin), turned, x.dtype), x, rtol=1e-6, atol=1e-6)
    assert torch.equal(there[:, turned:], x[:, turned:]) and torch.equal(there[0], x[0])
    assert turned == 0 or not torch.allclose(there[1:, :turned], x[1:, :turned])


def test_attention_on_a_cpu_is_in_fp32() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (
        attention_dtype(cpu, torch.bfloat16) == torch.float32 and attention_dtype(cpu, torch.float64) == torch.float64
    )
    assert attention_dtype(cuda, torch.bfloat16) == torch.bfloat16
    seen: list[torch.dtype] = []
    config = ModelConfig(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=32, quantization="none")
    attention = Attention(config, torch.bfloat16)
    for linear in (attention.qkv, attention.output):
        torch.nn.init.ones_(linear.weight)
    real = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda *a, **k: (seen.extend(t.dtype for t in a), real(*a, **k))[1]
        )
        attention(torch.randn(2, 5, 32), rotary(torch.arange(5).repeat(2), 16, 1e4), None)
    assert seen == [torch.float32] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slope_of_a_compiler_has_the_bits_of_a_cpu_s(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(20, 50) * 9, torch.randint(0, 50, (20,))
    want = softmax_slope(logits, labels, dtype)
    monkeypatch.setattr(cross_entropy, "is_eager_on_cpu", lambda x: False)
    got = softmax_slope(logits, labels, dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@settings(deadline=None)
@given(seed=st.integers(0, 999), power=st.integers(-3, 12))
def test_the_loss_of_each_token_is_finite_and_exact_however_far_apart_the_logits_are(seed: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 50, generator=generator) * 2.0**power
    labels = torch.randint(0, 50, (20,), generator=generator)
    losses, slope = softmax_slope(logits, labels, torch.float32)
    want = F.cross_entropy(logits.double(), labels, reduction="none")
    want_slope = torch.softmax(logits.double(), -1) - F.one_hot(labels, 50)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), want_slope, rtol=1e-5, atol=1e-6)
