"""The global batch is law: however it is cut into micro-batches, a step finds the same loss and gradient."""

from pathlib import Path

import pytest
import torch

from shared.manifest import load_manifest, open_stream
from train.config import Config, ModelConfig, apply_settings
from train.loop import Loop
from train.model import Model
from train.order import Order, rows

LENGTH, BATCH = 32, 8


def made(data: Path, micro: int, quantization: str = "none", compute: torch.dtype = torch.float32) -> Loop:
    torch.set_num_threads(1)
    manifest = load_manifest(data)
    sizes = ModelConfig(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab_size=1000)
    config = apply_settings(
        Config("test", model=sizes), [f"model.quantization={quantization}", f"batch.sequences={BATCH}"]
    )
    model = Model(config.model, compute)
    model.initialise(0)
    order = Order(manifest.id, 0, manifest.splits["train"].sequences, BATCH)
    return Loop(config, model, order, open_stream(data, manifest, "train"), length=LENGTH, micro=micro)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_global_batch(data: Path, micro: int) -> None:
    """Of the twin: in a BitLinear the last bit of a sum can move a code, and that is a whole step of it."""
    whole, cut = made(data, BATCH), made(data, micro)
    for n in (1, 2, 3):
        expected, found = whole.step(n), cut.step(n)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert found.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-4)


def test_the_loss_of_a_step_is_that_of_its_batch_before_the_update(data: Path) -> None:
    loop = made(data, 4, quantization="bitnet")
    tokens = torch.from_numpy(rows(loop.stream, loop.order.indices(1), LENGTH))
    with torch.no_grad():
        expected = loop.model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert loop.step(1).loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_not_finite_changes_no_bit_of_the_state(data: Path) -> None:
    loop = made(data, 4, quantization="bitnet")
    loop.step(1)
    before = {name: t.clone() for name, t in (loop.model_state() | loop.optimizer_state()).items()}
    real = loop.model.loss
    loop.model.loss = lambda *a: real(*a) * torch.inf  # type: ignore[method-assign]
    measured = loop.step(2)
    assert not measured.loss.isfinite()
    after = loop.model_state() | loop.optimizer_state()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_a_state_goes_over_to_another_loop_bit_for_bit(data: Path) -> None:
    first, second = made(data, 4, "bitnet"), made(data, 4, "bitnet")
    for n in (1, 2, 3):
        first.step(n)
    copies = [{k: v.clone() for k, v in part.items()} for part in (first.model_state(), first.optimizer_state())]
    second.load(*copies)
    for n in (4, 5):
        assert first.step(n).loss.equal(second.step(n).loss)
    assert all(t.equal(second.model_state()[name]) for name, t in first.model_state().items())


def test_the_state_of_another_model_is_refused(data: Path) -> None:
    loop = made(data, 4)
    model, optimizer = dict(loop.model_state()), dict(loop.optimizer_state())
    with pytest.raises(ValueError, match="not those of this model"):
        loop.load({name: t[:1] for name, t in model.items()}, optimizer)
    with pytest.raises(ValueError, match="does not fit"):
        loop.load(model, {name: t for name, t in optimizer.items() if not name.startswith("exp_avg.embedding")})


def test_an_attempt_at_a_micro_batch_leaves_nothing_behind(data: Path) -> None:
    tried, untried = made(data, 4, "bitnet"), made(data, 4, "bitnet")
    tried.attempt(8)
    assert all(p.grad is None for p in tried.model.parameters())
    assert tried.step(1).loss.equal(untried.step(1).loss)
    assert all(t.equal(untried.model_state()[name]) for name, t in tried.model_state().items())
