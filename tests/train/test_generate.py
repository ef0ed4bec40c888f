"""Sampling: the cache changes nothing, the randomness is its own, and training does not notice."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import ModelConfig
from train.generate import draw, generate
from train.model import Cache, Model

SMALL = ModelConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab_size=97, init_std=0.1)


def made(compute: torch.dtype = torch.float32) -> Model:
    model = Model(SMALL, compute)
    model.initialise(0)
    if compute == torch.float64:
        model.double()
        model.requantize()
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(model: Model, n: int = 20, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> list[int]:
    return generate(model, [1, 5, 9], n, length=64, temperature=temperature, top_p=top_p, generator=generator(seed))


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 23), max_size=6, unique=True), batch=st.integers(1, 3), seed=st.integers(0, 50))
def test_logits_with_the_cache_equal_those_without_in_fp64(cuts: list[int], batch: int, seed: int) -> None:
    model = made(torch.float64)
    ids = torch.randint(0, 97, (batch, 24), generator=generator(seed))
    cache = Cache(model, batch, 24)
    with torch.no_grad():
        edges = [0, *sorted(cuts), 24]
        parts = [model(ids[:, a:b], cache) for a, b in itertools.pairwise(edges)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-11, atol=1e-11)
    assert cache.length == 24


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_greedy_text_is_the_same_without_a_cache(compute: torch.dtype) -> None:
    model, ids = made(compute), [1, 5, 9]
    with torch.no_grad():
        for _ in range(15):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert sample(model, 15, temperature=0) == ids[3:]


def test_a_full_cache_is_not_written_past() -> None:
    model = made()
    cache = Cache(model, 1, 4)
    model(torch.ones(1, 3, dtype=torch.int64), cache)
    with pytest.raises(AssertionError, match="full"):
        model(torch.ones(1, 2, dtype=torch.int64), cache)


def test_sampling_leaves_a_run_as_it_was() -> None:
    model = made()
    ids = torch.randint(0, 97, (1, 9), generator=generator())
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    weights = [(p.detach().clone(), p._version, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    state, mode, codes = torch.get_rng_state(), model.training, [b.codes.clone() for b in model.bitlinears()]
    sample(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training == mode
    for p, (value, version, gradient) in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, value) and p._version == version
        assert p.grad is not None and gradient is not None and torch.equal(p.grad, gradient)
    assert all(b.fresh and torch.equal(b.codes, c) for b, c in zip(model.bitlinears(), codes, strict=True))


def test_the_same_generator_gives_the_same_text_whatever_the_global_one_does() -> None:
    model = made()
    first = sample(model, seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    assert sample(model, seed=3) == first != sample(model, seed=4)


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    source, n = generator(), 4000
    counts = torch.bincount(torch.tensor([draw(p.log(), 1.0, 1.0, source) for _ in range(n)]), minlength=4)
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    sharper = (p**2 / (p**2).sum()).tolist()  # temperature 1/2 squares them
    counts = torch.bincount(torch.tensor([draw(p.log(), 0.5, 1.0, source) for _ in range(n)]), minlength=4)
    assert (counts / n).tolist() == pytest.approx(sharper, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {2}), (0.49, {2}), (0.51, {0, 2}), (0.79, {0, 2}), (0.81, {0, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_likeliest_ids_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.3, 0.0625, 0.5, 0.1375]).double().log()
    source = generator()
    assert {draw(logits, 1.0, top_p, source) for _ in range(400)} == kept


@pytest.mark.parametrize("temperature", [0.0, 1e-307, 1e-9])
def test_the_coldest_text_is_the_likeliest(temperature: float) -> None:
    assert draw(torch.tensor([100.0, 300.0, 200.0, -700.0]), temperature, 1.0, generator()) == 1


def test_a_hot_draw_is_any() -> None:
    assert draw(torch.tensor([1e4, -1e4]), 1e300, 1.0, generator()) in (0, 1)


def test_generation_ends_at_the_stop_id_or_the_last_position() -> None:
    model = made()
    free = sample(model, 20)
    stop = free[7]
    ended = generate(model, [1, 5, 9], 20, length=64, temperature=1.0, top_p=1.0, generator=generator(), stop=stop)
    assert ended == free[: free.index(stop) + 1]
    assert len(generate(model, [1] * 60, 20, length=64, temperature=1, top_p=1, generator=generator())) == 4
    assert sample(model, 0) == []


@pytest.mark.parametrize(
    ("prompt", "temperature", "top_p", "named"),
    [
        ([], 1.0, 1.0, "prompt has 0 tokens"),
        ([1] * 64, 1.0, 1.0, "prompt has 64 tokens"),
        ([1], -1.0, 1.0, "temperature -1"),
        ([1], math.nan, 1.0, "temperature nan"),
        ([1], math.inf, 1.0, "temperature inf"),
        ([1], 1.0, 0.0, "top-p 0"),
        ([1], 1.0, 1.1, "top-p 1.1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(prompt: list[int], temperature: float, top_p: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        generate(made(), prompt, 5, length=64, temperature=temperature, top_p=top_p, generator=generator())


def test_a_diverged_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([0.0, math.nan]), 1.0, 1.0, generator())
