"""`train run`: verify the data set, settle the config, resume, train, finish. The only writer under runs/.

Every rank walks through this together; rank 0 alone verifies, holds the lock, reads and writes the run, and speaks.
Other hosts need the data set and nothing of the run.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from platform import node
from typing import Any

import torch

from shared.manifest import TOKENIZER, Manifest, check_files, load_manifest, open_stream
from shared.provenance import processor, provenance, utc_now
from shared.stop import Interrupted, Stop
from shared.tokenizer import load_tokenizer
from train import checkpoint, config, distributed, runtime
from train.config import Config
from train.console import Console
from train.logs import Logs
from train.loop import Loop
from train.metrics import TensorBoard
from train.model import Model
from train.order import Order
from train.report import leave_report
from train.run_folder import Facts, RunFolder, require_same
from train.training import TooManyAnomalies, Training

PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece")


@dataclass(frozen=True)
class Request:
    """What `train run` was asked for."""

    preset: str
    data: Path
    run: Path
    steps: int | None = None
    settings: Sequence[str] = ()
    device: str = "auto"
    restart: bool = False
    tensorboard: bool = False
    elastic: bool = False  # go on though the number of processes is another


def run(request: Request, stop: Stop) -> None:
    """Train as asked. ValueError says in a line what is wrong; Interrupted and TooManyAnomalies where it stopped."""
    with distributed.joined():
        manifest = verified(request.data, stop)
        settings = config.apply_settings(config.preset(request.preset), request.settings)
        settings = config.with_vocabulary(settings, manifest.tokenizer.vocab_size)
        order = Order(manifest.id, settings.seed, manifest.splits["train"].sequences, settings.batch.sequences)
        target = last_step(settings, order, request.steps)
        folder, console = RunFolder(request.run), Console(distributed.is_writer())
        with folder.lock() if distributed.is_writer() else nullcontext():
            anew = request.restart and not distributed.is_restarted()  # torchrun goes on with what --restart has begun
            stored = folder.facts() if distributed.is_writer() and folder.exists() and not anew else None
            facts = distributed.from_writer(lambda: settled(request, settings, manifest, stored))
            loop = built(facts, order, request.data, manifest)
            facts = replace(facts, runtime=replace(facts.runtime, micro=loop.micro))
            if anew and distributed.is_writer():
                folder.restart()
            point = resume_point(folder, console) if distributed.is_writer() else None
            tokenizer = load_tokenizer(request.data / TOKENIZER, manifest.tokenizer.sha256)
            validation = open_stream(request.data, manifest, "val") if "val" in manifest.splits else None
            logs = Logs(folder)
            training = Training(folder, facts, loop, logs, validation, tokenizer, console, stop)
            training.resume(point)
            if not training.has_work(target):
                console.say(
                    f"{folder.path}: step {training.step:,} is done and saved; nothing left to do up to step {target:,}"
                )
                return
            if request.tensorboard and distributed.is_writer():
                logs.sinks.append(TensorBoard(folder.path / "tensorboard", training.step + 1))
            entry = start_entry(request, facts, stored, training.step, target)
            if distributed.is_writer():
                folder.write_facts(facts)
                folder.begin(tokenizer.model)
                folder.write_start(entry, new=True)
            for line in announcement(request, facts, stored, loop, manifest, training.step, target):
                console.say(line)
            carry_out(training, target, entry)
            console.say(f"{folder.path}: done: step {training.step:,}, saved in {checkpoint.name_of(training.step)}")


def carry_out(training: Training, target: int, entry: dict[str, Any]) -> None:
    """Train up to step `target`, and write down in run.json how that ended."""
    outcome = "failed"
    try:
        training.run(target)
        outcome = "done"
    except Interrupted:
        outcome = "interrupted"
        raise
    except TooManyAnomalies:
        outcome = "stopped on anomalies"
        raise
    finally:
        if distributed.is_writer():
            folder = training.folder
            folder.write_start({**entry, "ended": utc_now(), "last_step": training.step, "outcome": outcome}, new=False)
            training.console.say(leave_report(folder.path))


def verified(data: Path, stop: Stop) -> Manifest:
    """The manifest of a data set whose every file has the hash it states. ValueError names each that has not.

    Of several processes rank 0 hashes; the others see that they have that data set too, wherever they run.
    """
    manifest = load_manifest(data)
    if distributed.is_writer():
        check_hashes(data, manifest, stop)
    if (verified_id := distributed.from_writer(lambda: manifest.id)) != manifest.id:
        raise ValueError(f"{data}: is data set {manifest.id} on {node()}, and {verified_id} where rank 0 runs")
    return manifest


def check_hashes(data: Path, manifest: Manifest, stop: Stop) -> None:
    """ValueError names each file that has not the hash that the manifest states."""

    def leave_at_a_signal(chunk: memoryview) -> None:
        if stop:
            raise Interrupted("stopped before the first step; the same command starts again")

    problems = check_files(data, manifest, observe=lambda file: leave_at_a_signal)
    if problems:
        named = "; ".join(f"{data / problem.file}: {problem.problem}" for problem in problems)
        raise ValueError(f"{named}; nothing trains on a damaged data set: python -m prep repair {data}")


def last_step(settings: Config, order: Order, steps: int | None) -> int:
    """The step to stop after. ValueError when the schedule or the data set does not go so far."""
    total = settings.schedule.total_steps
    if steps is not None and steps > total:
        raise ValueError(f"--steps {steps}: the schedule ends with step {total} (schedule.total_steps)")
    order.require(steps or total)
    return steps or total


def settled(request: Request, settings: Config, manifest: Manifest, stored: Facts | None) -> Facts:
    """What this run is. ValueError names each value in which a resume differs from the first start."""
    world_size = distributed.world_size()
    if settings.batch.sequences % world_size:
        raise ValueError(
            f"batch.sequences={settings.batch.sequences} cannot be shared out among {world_size} processes"
        )
    length = manifest.sequence_length
    if stored is None:
        chosen = runtime.choose(request.device, settings.batch.micro, world_size)
        return Facts(settings, manifest.id, length, chosen)
    asked = replace(
        stored.runtime,
        device=stored.runtime.device if request.device == "auto" else request.device,
        micro=settings.batch.micro or stored.runtime.micro,
        world_size=world_size,
    )
    if request.elastic and world_size != stored.runtime.world_size:
        asked = replace(asked, micro=settings.batch.micro)  # found anew: each process has another share of the batch
        stored = replace(stored, runtime=replace(stored.runtime, micro=asked.micro, world_size=world_size))
    facts = Facts(settings, manifest.id, length, asked)
    require_same(stored.identity(), facts.identity(), request.run)
    return facts


def built(facts: Facts, order: Order, data: Path, manifest: Manifest) -> Loop:
    """Model and loop on the device, initialised from the seed, with a micro-batch that fits."""
    device = runtime.prepare(facts.runtime, distributed.local_rank())
    torch.manual_seed(facts.config.seed)
    model = Model(facts.config.model, facts.runtime.compute).to(device)
    model.initialise(facts.config.seed)
    if facts.runtime.compile:
        runtime.compile_model(model)
    stream = open_stream(data, manifest, "train")
    loop = Loop(facts.config, model, order, stream, length=facts.sequence_length, micro=facts.runtime.micro or 0)
    if facts.runtime.micro is None:
        loop.micro = fitting_micro(facts, loop)
    return loop


def fitting_micro(facts: Facts, loop: Loop) -> int:
    """The largest micro-batch of the ladder that all ranks have the memory for."""
    share = facts.config.batch.sequences // facts.runtime.world_size
    candidates = runtime.ladder(share, facts.runtime.device)
    if facts.runtime.device == "cpu":
        return candidates[0]
    found = runtime.fit_micro(facts.runtime, candidates, loop.attempt).micro
    assert found is not None
    if facts.runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the memory of a run is not that of trying
    if facts.runtime.compile:
        torch._dynamo.reset()  # a resume does not try; what was compiled in trying must not differ from what it will
    return distributed.smallest(found)


def resume_point(folder: RunFolder, console: Console) -> Path | None:
    """The newest checkpoint that verifies. Damaged newer ones are moved aside and named."""

    def aside(damaged: Path, problem: str) -> None:
        console.say(f"{damaged} is damaged ({problem}); moved to {checkpoint.set_aside(damaged).name}")

    checkpoint.remove_partial(folder.checkpoints)
    return checkpoint.newest(folder.checkpoints, aside)


def start_entry(request: Request, facts: Facts, stored: Facts | None, first: int, target: int) -> dict[str, Any]:
    """One entry of run.json. `changed` lists the settings that differ from the start before: {name: [before, now]}."""
    before, now = settings_of(stored) if stored else {}, settings_of(facts)
    return {
        "started": utc_now(),
        **provenance(PACKAGES),
        "gpu": torch.cuda.get_device_name() if facts.runtime.device == "cuda" else None,
        "data": str(request.data.absolute()),
        "data_id": facts.data_id,
        "from_step": first,
        "to_step": target,
        "changed": {name: [value, now[name]] for name, value in before.items() if value != now[name]},
    }


def settings_of(facts: Facts) -> dict[str, Any]:
    """Flat: all that is set, and all that the runtime has resolved."""
    return config.flatten({**config.to_dict(facts.config), "runtime": runtime.to_dict(facts.runtime)})


def announcement(
    request: Request, facts: Facts, stored: Facts | None, loop: Loop, manifest: Manifest, first: int, target: int
) -> list[str]:
    """What a run says before its first step."""
    c, r = facts.config, facts.runtime
    name = torch.cuda.get_device_name() if r.device == "cuda" else processor()
    kind = "full precision" if c.model.quantization == "none" else "BitNet b1.58"
    lines = [
        f"data       {request.data}: every file verified, id {facts.data_id[:16]}…",
        f"model      {c.preset}: {sum(loop.model.num_parameters().values()):,} parameters, {kind}",
        f"device     {r.device} ({name}), {r.precision}, {r.threads} threads, torch {torch.__version__}"
        + (f", {r.world_size} processes" if r.world_size > 1 else ""),
        f"batch      {c.batch.sequences} sequences x {facts.sequence_length:,} tokens, {r.micro} at a time",
        f"steps      {first + 1:,} to {target:,} of {c.schedule.total_steps:,}"
        + (f", going on from checkpoint {checkpoint.name_of(first)}" if first else ""),
        "Ctrl-C is safe: the state is saved and the same command goes on.",
    ]
    if "val" not in manifest.splits:
        lines.insert(-1, "no validation split: nothing is evaluated")
    if stored and stored.runtime.world_size != r.world_size:
        before = stored.runtime.world_size
        lines.insert(-1, f"elastic    processes: {before} before, {r.world_size} now: same order, but other bits")
    return lines
