"""The network against Transformers' BitNetForCausalLM in fp64, its counts, its loss, its twin, and stale codes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train import bitlinear, cross_entropy, rows
from train.config import ModelConfig, OptimizerConfig, apply_settings, preset
from train.model import Cache, Model
from train.optimizer import AdamW

SMALL = ModelConfig(hidden=96, layers=2, heads=6, kv_heads=3, head_dim=16, ffn=160, vocab_size=211, init_std=0.1)


def made(config: ModelConfig = SMALL, compute: torch.dtype = torch.float32, seed: int = 0) -> Model:
    model = Model(config, compute)
    model.initialise(seed)
    if compute == torch.float64:
        model.double()
        model.requantize()
    return model


def tokens(*shape: int, vocab: int = 211, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def twin_of(config: ModelConfig) -> ModelConfig:
    return ModelConfig(**{**config.__dict__, "quantization": "none"})


def test_95m_has_95367936_parameters_in_one_tied_model() -> None:
    model = Model(preset("95m").model)
    assert sum(p.numel() for p in model.parameters()) == 95_367_936
    groups = model.num_parameters()
    assert groups == {"embedding": 24_576_000, "attention": 8 * 1_769_472, "ffn": 8 * 7_077_888, "norms": 17 * 768}
    attention = sum(p.numel() for n, p in model.layers[0].named_parameters() if n.startswith("attention"))
    ffn = sum(p.numel() for n, p in model.layers[0].named_parameters() if n.startswith("ffn"))
    assert (attention, ffn) == (1_770_240, 7_078_656)
    assert [name for name, p in model.state_dict().items() if len(p) == 32_000] == ["embedding"], "one tied tensor"


@pytest.mark.parametrize("quantization", ["bitnet", "none"])
def test_the_first_loss_of_95m_is_that_of_an_untrained_model(quantization: str) -> None:
    config = apply_settings(preset("95m"), [f"model.quantization={quantization}"]).model
    model = made(config, seed=3)
    ids = tokens(1, 513, vocab=32_000)
    with torch.no_grad():
        assert 10.3 < model.loss(ids[:, :-1], ids[:, 1:]).item() < 10.7


class TextbookLinear(nn.Linear):
    """W, straight through: the reference's BitLinear in the dtype it is given."""

    def forward(self, x: Tensor) -> Tensor:
        gamma = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x_q = (x * (127 / gamma)).round().clamp(-128, 127) * gamma / 127
        s = self.weight.abs().mean().clamp(min=1e-5)
        w_q = (self.weight * (1 / s)).round().clamp(-1, 1) * s
        return F.linear(x + (x_q - x).detach(), self.weight + (w_q - self.weight).detach())


def transformers_bitnet(model: Model, monkeypatch: pytest.MonkeyPatch, linear: type[nn.Linear]) -> nn.Module:
    """Transformers' model with the weights of ours, in fp64. Its norm computes in fp32 by name: that is patched."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.bitnet import modeling_bitnet

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling_bitnet.BitNetRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_bitnet.nn, "Linear", linear)
    c = model.config
    config = transformers.BitNetConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        hidden_act="silu",
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    reference = modeling_bitnet.BitNetForCausalLM(config).double()
    monkeypatch.undo()
    monkeypatch.setattr(modeling_bitnet.BitNetRMSNorm, "forward", norm)
    reference.lm_head = nn.Linear(c.hidden, c.vocab_size or 0, bias=False, dtype=torch.float64)
    reference.lm_head.weight = reference.model.embed_tokens.weight
    missing, unexpected = reference.load_state_dict(renamed(dict(model.state_dict()), c), strict=False)
    assert not unexpected and {name.split(".")[-2] for name in missing} == {"attn_sub_norm", "ffn_sub_norm"}
    return reference


def renamed(ours: dict[str, Tensor], c: ModelConfig) -> dict[str, Tensor]:
    """Tensors of ours, weights or gradients, under Transformers' names, fused matrices apart."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    theirs = {"model.embed_tokens.weight": ours["embedding"], "lm_head.weight": ours["embedding"]}
    theirs["model.norm.weight"] = ours["norm.weight"]
    for i in range(c.layers):
        a, b = f"layers.{i}.", f"model.layers.{i}."
        theirs[b + "input_layernorm.weight"] = ours[a + "attention_norm.weight"]
        theirs[b + "post_attention_layernorm.weight"] = ours[a + "ffn_norm.weight"]
        parts = torch.split(ours[a + "attention.qkv.weight"], [q, kv, kv])
        theirs |= {f"{b}self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
        theirs[b + "self_attn.o_proj.weight"] = ours[a + "attention.output.weight"]
        gate, up = torch.split(ours[a + "ffn.gate_up.weight"], [c.ffn, c.ffn])
        theirs |= {b + "mlp.gate_proj.weight": gate, b + "mlp.up_proj.weight": up}
        theirs[b + "mlp.down_proj.weight"] = ours[a + "ffn.down.weight"]
    return theirs


@pytest.mark.parametrize(("quantization", "linear"), [("bitnet", TextbookLinear), ("none", nn.Linear)])
def test_the_model_equals_transformers_bitnet_in_fp64(
    quantization: str, linear: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(**{**SMALL.__dict__, "quantization": quantization})
    model = made(config, torch.float64)
    with torch.no_grad():  # norms that are not one, so that a norm left out or misplaced shows
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.linspace(0.5, 1.5, len(p), dtype=torch.float64).roll(len(name)))
    model.requantize()
    reference = transformers_bitnet(model, monkeypatch, linear)
    ids = tokens(2, 65)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    theirs = reference(inputs).logits
    torch.testing.assert_close(model(inputs), theirs, rtol=1e-10, atol=1e-10)

    want = F.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    want.backward()
    loss = model.loss(inputs, labels)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    want_gradients = {name: p.grad for name, p in reference.named_parameters()}
    compared = {name for name in renamed(gradients, config) if name != "lm_head.weight"}
    for name in compared:
        got, wanted = renamed(gradients, config)[name], want_gradients[name]
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11, msg=name)
    assert {name for name in want_gradients if "sub_norm" not in name} == compared


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 30), vocab=st.integers(2, 50), chunk=st.integers(1, 12), cached=st.integers(1, 7))
def test_the_chunked_loss_equals_the_whole_one(m: int, vocab: int, chunk: int, cached: int) -> None:
    generator = torch.Generator().manual_seed(m)
    hidden = torch.randn(m, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(vocab, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (m,), generator=generator)
    whole = F.cross_entropy(hidden @ head.t(), labels)
    (want_hidden, want_head) = torch.autograd.grad(whole, (hidden, head), torch.tensor(0.3, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK", chunk)
        patch.setattr(rows, "rows_at_once", lambda x: cached)
        loss = cross_entropy.cross_entropy(hidden, head, labels)
        got = torch.autograd.grad(loss, (hidden, head), torch.tensor(0.3, dtype=torch.float64))
        with torch.no_grad():
            assert cross_entropy.cross_entropy(hidden, head, labels) == loss
    torch.testing.assert_close((loss, *got), (whole, want_hidden, want_head), rtol=1e-12, atol=1e-13)


def test_the_softmax_is_fp32_whatever_the_products_are() -> None:
    hidden, head = torch.randn(40, 16).bfloat16(), torch.randn(100, 16)
    labels = tokens(40, vocab=100)
    loss = cross_entropy.cross_entropy(hidden, head, labels)
    logits = hidden @ head.bfloat16().t()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_over_all_labels(compute: torch.dtype) -> None:
    model, ids = made(compute=compute), tokens(3, 33)
    want = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]), want, rtol=1e-6, atol=1e-6)


def test_micro_batches_add_up_to_the_batch() -> None:
    model, ids = made(compute=torch.float64), tokens(6, 17)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in torch.split(ids, 2):
        (model.loss(part[:, :-1], part[:, 1:]) / 3).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-9, atol=1e-12, msg=name)


def test_no_position_sees_a_later_one() -> None:
    model, ids = made(compute=torch.float64), tokens(1, 24)
    changed = ids.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 211
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=1e-12, atol=1e-12)
    assert (before[:, 15:] != after[:, 15:]).any(-1).all(), "and each sees itself"


def test_positions_matter() -> None:
    model, ids = made(compute=torch.float64), torch.full((1, 3), 5)
    ids[0, 0] = 9
    swapped = ids[:, [1, 0, 2]]
    assert not torch.allclose(model(ids)[:, -1], model(swapped)[:, -1]), "attention alone would not know the order"


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = made(seed=5), made(seed=5), made(seed=6)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is nobody's"
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c), name
        assert (a == 1).all() if a.dim() == 1 else abs(a.std().item() / SMALL.init_std - 1) < 0.05


def test_the_twin_has_the_same_parameters_and_start() -> None:
    model, twin = made(), made(twin_of(SMALL))
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    ids = tokens(1, 8)
    assert not torch.equal(model(ids), twin(ids)) and not twin.bitlinears()


def nudge(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].ffn.down.weight.add_(1e-9)


def load(model: Model) -> None:
    model.load_state_dict(made(seed=9).state_dict())


def update(model: Model) -> None:
    optimizer = AdamW(model, OptimizerConfig())
    ids = tokens(1, 9)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step(1e-3, 0.0, optimizer.gradient_norm(), torch.tensor(True))


@pytest.mark.parametrize("change", [nudge, load, update])
def test_stale_codes_are_noticed(change: Callable[[Model], None]) -> None:
    model, ids = made(), tokens(1, 9)
    change(model)
    for use in (
        lambda: model(ids),
        lambda: model.loss(ids[:, :-1], ids[:, 1:]),
        lambda: model(ids, Cache(model, 1, 9)),
    ):
        with pytest.raises(AssertionError, match="stale codes"):
            use()
    model.requantize()
    model(ids)


def test_weights_are_quantised_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = made(), tokens(4, 9)
    calls = []
    real = bitlinear.quantize_weight
    monkeypatch.setattr(bitlinear, "quantize_weight", lambda *a: (calls.append(a), real(*a))[1])
    optimizer = AdamW(model, OptimizerConfig())
    for _ in range(2):
        for part in torch.split(ids, 1):
            model.loss(part[:, :-1], part[:, 1:]).backward()
        optimizer.step(1e-3, 0.0, optimizer.gradient_norm(), torch.tensor(True))
        model.requantize()
        with torch.no_grad():
            model.loss(ids[:, :-1], ids[:, 1:])
    assert len(calls) == 2 * len(model.bitlinears()) == 2 * 4 * SMALL.layers


def test_codes_are_not_state() -> None:
    assert set(made().state_dict()) == {name for name, _ in made().named_parameters()}


def test_a_step_learns() -> None:
    model = made(compute=torch.bfloat16)
    optimizer, ids = AdamW(model, OptimizerConfig()), tokens(2, 33)
    losses = []
    for _ in range(30):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step(3e-3, 0.1, optimizer.gradient_norm(), torch.tensor(True))
        optimizer.zero_grad()
        model.requantize()
        losses.append(loss.item())
    assert losses[0] > math.log(211) - 0.5 and losses[-1] < 0.5 * losses[0]
