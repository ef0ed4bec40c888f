"""BitLinear against exact integers, NumPy and a textbook BitLinear in fp64."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.bitlinear import (
    BitLinear,
    code_dtype,
    derive,
    int8_is_exact,
    integer_product,
    quantize_activations,
    quantize_weight,
)

KINDS = (torch.int8, torch.bfloat16, torch.float32)


def textbook(x: Tensor, weight: Tensor, segments: tuple[int, ...]) -> Tensor:
    """The paper's formula with straight-through rounding, for autograd to differentiate."""
    gamma = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    x_q = (x * (127 / gamma)).round().clamp(-128, 127) * (gamma / 127)
    w_q = []
    for w in torch.split(weight, list(segments)):
        s = w.abs().mean().clamp(min=1e-5)
        w_q.append((w * (1 / s)).round().clamp(-1, 1) * s)
    return F.linear(x + (x_q - x).detach(), weight + (torch.cat(w_q) - weight).detach())


def layer(
    k: int, segments: tuple[int, ...], compute: torch.dtype, seed: int = 0, dtype: torch.dtype = torch.float32
) -> BitLinear:
    made = BitLinear(k, segments, compute).to(dtype)
    with torch.no_grad():
        made.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    made.quantize()
    return made


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x_codes: Tensor, w_codes: Tensor) -> npt.NDArray[np.int64]:
    return x_codes.to(torch.int64).numpy() @ w_codes.to(torch.int64).numpy().T


@settings(deadline=None)
@given(
    m=st.integers(1, 40), k=st.integers(1, 300), n=st.integers(1, 70), seed=st.integers(0, 99), extreme=st.booleans()
)
def test_every_path_gives_the_exact_integer_sums(m: int, k: int, n: int, seed: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((m, k), -128) if extreme else torch.randint(-128, 128, (m, k), generator=generator)
    w = torch.full((n, k), -1) if extreme else torch.randint(-1, 2, (n, k), generator=generator)
    for kind in KINDS:
        sums = integer_product(x.to(kind), w.to(kind))
        assert sums.dtype in (torch.int32, torch.float32)
        assert np.array_equal(sums.to(torch.int64).numpy(), exact(x, w)), kind


@pytest.mark.parametrize("shape", [(1024, 768, 1536), (256, 3072, 768)])
def test_every_path_gives_the_exact_sums_at_the_real_sizes(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(7)
    x, w = torch.randint(-127, 128, (m, k), generator=generator), torch.randint(-1, 2, (n, k), generator=generator)
    first = integer_product(x.to(torch.int8), w.to(torch.int8))
    for kind in KINDS[1:]:
        assert torch.equal(integer_product(x.to(kind), w.to(kind)), first.float())
    assert not torch.equal(first.bfloat16().to(torch.int32), first), "these sums would not survive bf16"


def test_a_processor_whose_int8_units_saturate_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_dtype(torch.device("cpu")) == torch.int8, "or this machine's int8 units are inexact"

    def saturating(a: Tensor, b: Tensor) -> Tensor:  # as vpmaddubsw, where pairs of products meet in few bits
        products = a.to(torch.int32)[:, :, None] * b.to(torch.int32)[None]
        return products.unflatten(1, (-1, 2)).sum(2).clamp(-255, 255).sum(1)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    int8_is_exact.cache_clear()
    try:
        assert code_dtype(torch.device("cpu")) == torch.float32
    finally:
        int8_is_exact.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bf16_units_of_a_gpu_give_the_exact_sums() -> None:
    generator = torch.Generator().manual_seed(7)
    for m, k, n in ((4096, 768, 6144), (4096, 3072, 768), (17, 768, 1536)):
        x, w = torch.randint(-127, 128, (m, k), generator=generator), torch.randint(-1, 2, (n, k), generator=generator)
        sums = integer_product(x.to("cuda", torch.bfloat16), w.to("cuda", torch.bfloat16))
        assert sums.dtype == torch.float32
        assert torch.equal(sums.cpu().to(torch.int32), integer_product(x.to(torch.int8), w.to(torch.int8)))


def test_rounding_is_half_to_even_and_clipped() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])  # 127 / max = 1: halves stay halves
    codes, scale = quantize_activations(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]] and scale.tolist() == [[1.0]]
    w = torch.tensor([[2.0, 0.5, -0.5, 1.0]])  # mean |w| = 1
    codes, scale = quantize_weight(w, (1,))
    assert codes.tolist() == [[1, 0, 0, 1]] and scale.tolist() == [1.0]


@settings(deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 200), power=st.integers(-30, 30))
def test_codes_follow_the_formula_in_fp32(seed: int, k: int, power: int) -> None:
    values = (normal(5, k, seed=seed) * 2.0**power).numpy()
    largest = np.maximum(np.abs(values).max(-1, keepdims=True), np.float32(1e-5))
    want = np.clip(np.rint(values * (np.float32(127) / largest)), -128, 127)
    codes, scale = quantize_activations(torch.from_numpy(values))
    assert codes.dtype == scale.dtype == torch.float32
    assert np.array_equal(codes.numpy(), want) and np.array_equal(scale.numpy(), largest / np.float32(127))


@settings(deadline=None)
@given(seed=st.integers(0, 999), power=st.integers(-30, 10))
def test_weights_follow_the_formula_in_fp32(seed: int, power: int) -> None:
    weight = normal(6, 40, seed=seed) * 2.0**power
    codes, scale = quantize_weight(weight, (2, 4))
    for rows in (slice(0, 2), slice(2, 6)):
        s = np.float32(max(weight[rows].abs().mean().item(), np.float32(1e-5)))
        want = np.clip(np.rint(weight[rows].numpy() * (np.float32(1) / s)), -1, 1)
        assert np.array_equal(codes[rows].numpy(), want) and (scale[rows].numpy() == s).all()


def test_scales_and_codes_are_fp32_also_for_bf16_inputs() -> None:
    x = normal(64, 768).bfloat16()
    codes, scale = quantize_activations(x)
    want, want_scale = quantize_activations(x.float())
    assert torch.equal(codes, want) and torch.equal(scale, want_scale) and codes.dtype == torch.float32
    in_bf16 = (x * (127 / x.abs().amax(-1, keepdim=True))).round().float()
    assert (in_bf16 != codes).float().mean() > 0.01, "done in bf16, codes change"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_product_is_scaled_in_fp32_and_cast_once(compute: torch.dtype) -> None:
    bit, x = layer(768, (256, 128), compute), normal(32, 768)
    x_codes, x_scale = quantize_activations(x)
    w_codes, w_scale = quantize_weight(bit.weight.detach(), bit.segments)
    sums = torch.from_numpy(exact(x_codes, w_codes)).float()
    y = bit(x)
    assert y.dtype == compute and torch.equal(y, (sums * x_scale * w_scale).to(compute))


def test_all_kinds_of_codes_give_the_same_layer() -> None:
    bit, x = layer(96, (64, 32), torch.float32), normal(10, 96)
    want = bit(x)
    for kind in KINDS:
        bit.codes, bit.scale, bit.quantized = derive(bit.weight.detach(), bit.segments, kind, torch.float32)
        assert bit.codes.dtype == kind and torch.equal(bit(x), want)


def test_fused_matrices_equal_separate_ones() -> None:
    fused, x = layer(64, (48, 24, 24), torch.float32), normal(7, 64)
    fused.weight.data[48:72] *= 10  # scales far apart
    fused.quantize()
    apart = []
    for rows in torch.split(fused.weight.detach(), [48, 24, 24]):
        one = BitLinear(64, (len(rows),), torch.float32)
        one.weight.data.copy_(rows)
        one.quantize()
        apart.append(one(x))
    assert torch.equal(fused(x), torch.cat(apart, -1))


@settings(deadline=None)
@given(seed=st.integers(0, 99), m=st.integers(1, 9), k=st.integers(1, 60))
def test_gradients_equal_a_textbook_bitlinear_in_fp64(seed: int, m: int, k: int) -> None:
    bit = layer(k, (5, 3), torch.float64, seed, torch.float64)
    x, g = normal(m, k, seed=seed).double().requires_grad_(), normal(m, 8, seed=seed + 1).double()
    y = bit(x)
    y.backward(g)
    x_ref, w_ref = x.detach().clone().requires_grad_(), bit.weight.detach().clone().requires_grad_()
    y_ref = textbook(x_ref, w_ref, bit.segments)
    y_ref.backward(g)
    for got, want in ((y, y_ref), (x.grad, x_ref.grad), (bit.weight.grad, w_ref.grad)):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("compute", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_gradients_are_as_near_to_fp64_as_their_dtype_allows(compute: torch.dtype, tolerance: float) -> None:
    bit = layer(768, (192, 96), compute)
    x, g = normal(64, 768).requires_grad_(), normal(64, 288, seed=2).to(compute)
    bit(x).backward(g)
    x_ref, w_ref = x.detach().double().requires_grad_(), bit.weight.detach().double().requires_grad_()
    # Codes come from fp32; fp64 rounds a borderline one otherwise.  Differentiate the formula at the fp32 codes.
    x_codes, x_scale = quantize_activations(x.detach())
    x_q, w_q = x_codes.double() * x_scale.double(), bit.codes.double() * bit.scale.double()[:, None]
    F.linear(x_ref + (x_q - x_ref).detach(), w_ref + (w_q - w_ref).detach()).backward(g.double())
    for got, want in ((x.grad, x_ref.grad), (bit.weight.grad, w_ref.grad)):
        assert got is not None and want is not None and got.dtype == torch.float32
        assert (got.double() - want).norm() / want.norm() < tolerance


def test_zeros_are_harmless() -> None:
    bit, x = layer(16, (8,), torch.float32), torch.zeros(3, 16, requires_grad=True)
    y = bit(x)
    y.sum().backward()
    assert (y == 0).all() and x.grad is not None and x.grad.isfinite().all()
    with torch.no_grad():
        bit.weight.zero_()
    bit.quantize()
    assert (bit(normal(3, 16)) == 0).all()


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    bit, x = layer(64, (32,), torch.float32), normal(9, 64)
    assert torch.equal(torch.cat([bit(row) for row in torch.split(x, 1)]), bit(x))
    assert torch.equal(bit(x.view(3, 3, 64)), bit(x).view(3, 3, 32))


def test_fresh_follows_the_weight() -> None:
    bit = BitLinear(8, (4,), torch.float32)
    assert not bit.fresh
    torch.nn.init.ones_(bit.weight)
    bit.quantize()
    assert bit.fresh
    bit.load_state_dict({"weight": torch.ones(4, 8)})
    assert not bit.fresh
    assert list(bit.state_dict()) == ["weight"], "codes are derived and never saved"
