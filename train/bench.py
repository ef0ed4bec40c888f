"""`train bench`: what training costs, for BitNet, its full-precision twin and a textbook BitLinear, in one run.

All are measured in turns, a round after another, so that a machine whose speed drifts is fair to all; what is printed
are medians over the rounds, and a ratio is the median of the rounds' ratios. Tokens are random: values do not matter.

A step of a batch is so many micro-batches, each a forward and a backward pass, and one update (clip, AdamW, codes). A
round times one micro-batch and one update of each candidate; a step's time follows from the two.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.provenance import processor
from train import runtime
from train.config import Config
from train.kernels import GROUPS, kernels_of_cuda, operations_of_host
from train.model import Model
from train.optimizer import AdamW
from train.runtime import Runtime
from train.textbook import Textbook

LENGTH = 1024  # tokens of a sequence
VOCABULARY = 32_000  # of a preset that has none of its own


@dataclass(frozen=True)
class Candidate:
    """Something that trains. `micro_batch` is a forward and a backward pass, `update` what follows the last of them."""

    name: str
    micro_batch: Callable[[], None]
    update: Callable[[], None]
    holds: Callable[[], list[Tensor]]  # what stays on the device between the two: parameters, gradients, moments, codes
    settings: Callable[[], AbstractContextManager[None]] = nullcontext  # that both run under


@dataclass(frozen=True)
class Timed:
    """Seconds of one micro-batch and one update, by round, and the most device memory (None where not counted)."""

    micro_batch: list[float]
    update: list[float]
    memory: int | None


def bench(config: Config, device: str, rounds: int) -> dict[str, Any]:
    """Measure; the object of `--json`. ValueError where the device is missing or too small."""
    if config.model.vocab_size is None:
        config = replace(config, model=replace(config.model, vocab_size=VOCABULARY))
    chosen = runtime.choose(device, config.batch.micro)
    where = runtime.prepare(chosen)
    if chosen.micro is None:
        chosen = fitted(config, chosen, where)
    candidates = list(made(config, chosen, where))
    timed = measure(candidates, rounds, where)
    found = summary(config, chosen, where, timed)
    left_out = [c.name for c in candidates if c.name not in timed]
    kernels = shares(candidates[0], config.batch.sequences // found["micro"], where)
    return {**found, "out_of_memory": left_out, "kernels": kernels}


def made(config: Config, chosen: Runtime, device: torch.device) -> Iterator[Candidate]:
    """BitNet first: the others are compared with it."""
    assert chosen.micro is not None and config.model.vocab_size is not None
    ids = torch.randint(config.model.vocab_size, (chosen.micro, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = ids[:, :-1].to(device), ids[:, 1:].to(device)
    bitnet = ours("BitNet", config, "bitnet", chosen, tokens, labels)
    yield bitnet
    if chosen.device == "cuda":
        yield replace(bitnet, name="BitNet, not deterministic", settings=Free)
    yield ours("twin", config, "none", chosen, tokens, labels)
    for dtype in [torch.bfloat16] * (chosen.precision == "bf16") + [torch.float32]:
        yield textbook(config, dtype, tokens, labels)


def ours(name: str, config: Config, quantization: Any, chosen: Runtime, tokens: Tensor, labels: Tensor) -> Candidate:
    """The model that `train run` trains, compiled where it is."""
    model = Model(replace(config.model, quantization=quantization), chosen.compute).to(tokens.device)
    model.initialise(config.seed)
    if chosen.compile:
        runtime.compile_model(model)
    optimizer = AdamW(model, config.optimizer)

    def update() -> None:
        norm = optimizer.gradient_norm()
        optimizer.step(1e-4, 0.1, norm, norm.isfinite())
        model.requantize()

    def holds() -> list[Tensor]:
        derived = [t for linear in model.bitlinears() for t in (linear.codes, linear.scale, linear.quantized)]
        return [*with_gradients(model), *optimizer.state_dict().values(), *derived]

    return Candidate(name, lambda: model.loss(tokens, labels).backward(), update, holds)  # type: ignore[no-untyped-call]


def textbook(config: Config, dtype: torch.dtype, tokens: Tensor, labels: Tensor) -> Candidate:
    """The baseline: fp32, or under autocast to bf16; torch's clip and AdamW as they come."""
    model = Textbook(config.model).to(tokens.device)
    start = Model(config.model)
    start.initialise(config.seed)
    model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def micro_batch() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(tokens, labels)
        loss.backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()

    def holds() -> list[Tensor]:
        moments = [t for state in optimizer.state.values() for t in state.values()]
        return [*with_gradients(model), *moments]

    name = "textbook, bf16 autocast" if dtype == torch.bfloat16 else "textbook, fp32"
    return Candidate(name, micro_batch, update, holds, Plain)


def with_gradients(model: nn.Module) -> list[Tensor]:
    return [t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]


class Plain:
    """Matrix products in fp32 as torch makes them unless told otherwise."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


class Free:
    """Without deterministic mode."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)

    def __exit__(self, *_: object) -> None:
        runtime.make_deterministic()


def fitted(config: Config, chosen: Runtime, device: torch.device) -> Runtime:
    """`chosen` with the micro-batch that a run would take."""
    candidates = runtime.ladder(config.batch.sequences, chosen.device)
    if chosen.device == "cpu":
        return replace(chosen, micro=candidates[0])

    def attempt(micro: int) -> None:
        bitnet = next(made(config, replace(chosen, micro=micro, compile=False), device))
        bitnet.micro_batch()
        bitnet.micro_batch()
        bitnet.update()

    return runtime.fit_micro(chosen, candidates, attempt)


def measure(
    candidates: list[Candidate], rounds: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timed]:
    """Time `rounds` rounds, after two that warm up (the second grows gradients instead of making them).

    A candidate that runs out of device memory is left out from there on; ValueError where it is the first.
    """

    def seconds(work: Callable[[], None]) -> float:
        synchronize(device)
        began = clock()
        work()
        synchronize(device)
        return clock() - began

    timed = {c.name: Timed([], [], None) for c in candidates}
    for number in range(rounds + 2):
        for candidate in [c for c in candidates if c.name in timed]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                of_others = torch.cuda.memory_allocated(device) - sum(t.nbytes for t in candidate.holds())
            try:
                with candidate.settings():
                    found = seconds(candidate.micro_batch), seconds(candidate.update)
            except torch.OutOfMemoryError:
                if candidate is candidates[0]:
                    raise ValueError(
                        f"{candidate.name} runs out of memory beside what it is compared with; "
                        "give --set batch.micro=N with a smaller N"
                    ) from None
                del timed[candidate.name]
                continue
            if number >= 2:
                timed[candidate.name].micro_batch.append(found[0])
                timed[candidate.name].update.append(found[1])
            if device.type == "cuda":
                memory = torch.cuda.max_memory_allocated(device) - of_others
                timed[candidate.name] = replace(timed[candidate.name], memory=memory)
    return timed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def summary(config: Config, chosen: Runtime, device: torch.device, timed: dict[str, Timed]) -> dict[str, Any]:
    """What was measured, in tokens, seconds and bytes."""
    assert chosen.micro is not None
    sequences, first = config.batch.sequences, next(iter(timed))
    micros = sequences // chosen.micro
    steps = {name: [micros * a + b for a, b in zip(t.micro_batch, t.update, strict=True)] for name, t in timed.items()}
    flops, peak = runtime.flops_per_token(config.model, LENGTH), runtime.peak_flops(device)
    results = {}
    for name, t in timed.items():
        speed = sequences * LENGTH / statistics.median(steps[name])
        results[name] = {
            "tokens_per_second": speed,
            "step_ms": statistics.median(steps[name]) * 1e3,
            "micro_batch_ms": statistics.median(t.micro_batch) * 1e3,
            "update_ms": statistics.median(t.update) * 1e3,
            "flops_per_second": speed * flops,
            "mfu": speed * flops / peak if peak else None,
            "memory_bytes": t.memory,
            "speed_of_first": statistics.median(a / b for a, b in zip(steps[name], steps[first], strict=True)),
        }
    return {
        "preset": config.preset,
        "device": chosen.device,
        "name": torch.cuda.get_device_name(device) if chosen.device == "cuda" else processor(),
        "threads": chosen.threads,
        "precision": chosen.precision,
        "torch": torch.__version__,
        "sequences": sequences,
        "sequence_length": LENGTH,
        "micro": chosen.micro,
        "rounds": len(timed[first].update),
        "results": results,
        "process_memory_bytes": runtime.peak_memory(torch.device("cpu")),
    }


def shares(candidate: Candidate, micros: int, device: torch.device) -> dict[str, float]:
    """The share of a step that each group of kernels takes, from a profile of one micro-batch and one update."""
    spent = dict.fromkeys(GROUPS, 0.0)
    for work, times in ((candidate.micro_batch, micros), (candidate.update, 1)):
        with candidate.settings():
            found = kernels_of_cuda(work) if device.type == "cuda" else operations_of_host(work)
        for group, microseconds in found:
            spent["update" if work is candidate.update else group] += times * microseconds
    whole = sum(spent.values())
    return {group: spent_on / whole for group, spent_on in spent.items()}


def table(found: dict[str, Any]) -> Iterator[str]:
    """The result for people, a line at a time."""
    yield (
        f"{found['preset']} on {found['device']} ({found['name']}), {found['threads']} threads, "
        f"torch {found['torch']}; ours in {found['precision']}"
    )
    yield (
        f"a step is {found['sequences']} x {found['sequence_length']:,} tokens, {found['micro']} sequences at a time; "
        f"medians of {found['rounds']} rounds"
    )
    yield ""
    columns = f"{'tokens/s':>10}  {'ms a step':>10}  {'update ms':>9}  {'MFU':>6}  {'memory GB':>9}  {'BitNet is':>9}"
    yield f"{'':26}  {columns}"
    for name, r in found["results"].items():
        mfu = f"{100 * r['mfu']:.1f}%" if r["mfu"] is not None else "-"
        memory = f"{r['memory_bytes'] / 1e9:.2f}" if r["memory_bytes"] is not None else "-"
        yield (
            f"{name:26}  {r['tokens_per_second']:>10,.0f}  {r['step_ms']:>10,.1f}  {r['update_ms']:>9,.1f}  {mfu:>6}  "
            f"{memory:>9}  {r['speed_of_first']:>8.2f}x"
        )
    yield from (f"{name:26}  runs out of memory" for name in found["out_of_memory"])
    yield ""
    yield "where BitNet's time goes: " + ", ".join(
        f"{group} {100 * share:.0f}%" for group, share in found["kernels"].items()
    )
    yield f"memory of the whole process, all of these together: {found['process_memory_bytes'] / 1e9:.2f} GB"
