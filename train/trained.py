"""A run's newest model, to read: what `train eval` and `train sample` work on. Training is not disturbed by it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shared.durable import write_durably
from shared.manifest import TOKENIZER, open_stream
from shared.stop import Interrupted, Stop
from shared.tokenizer import Tokenizer, load_tokenizer
from train import checkpoint, runtime
from train.evaluate import evaluate
from train.generate import check
from train.metrics import to_json
from train.model import Model
from train.run import verified
from train.run_folder import Facts, RunFolder
from train.samples import continued, encode


@dataclass(frozen=True)
class Trained:
    """The model after `step` updates, on a device of this machine."""

    folder: RunFolder
    facts: Facts
    tokenizer: Tokenizer
    model: Model
    step: int


def load_trained(path: Path, say: Callable[[str], None]) -> Trained:
    """The newest checkpoint of a run that verifies; `say` is told of newer ones that do not. ValueError without any."""
    folder = RunFolder(path)
    facts = folder.facts()
    point = checkpoint.newest(folder.checkpoints, lambda damaged, problem: say(f"{damaged} is damaged ({problem})"))
    if point is None:
        raise ValueError(f"{path}: no checkpoint yet; python -m train run saves one wherever it stops")
    resolved = facts.runtime
    try:
        device = runtime.prepare(resolved)
    except ValueError:  # it was trained on a device that is not here: any other will do to read it
        resolved = replace(runtime.choose("auto", resolved.micro), threads=resolved.threads)
        device = runtime.prepare(resolved)
    found = checkpoint.load(point)
    model = Model(facts.config.model, resolved.compute)
    model.load_state_dict(found.model)
    model.to(device).requantize()
    return Trained(folder, facts, load_tokenizer(path / TOKENIZER), model, found.step)


def evaluate_run(
    path: Path, *, sequences: int | None, data: Path | None, stop: Stop, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate on the first `sequences` of the validation split, by default on all; keep it in evals/step-N.json.

    The data set is that of the last start, or `data`. ValueError when it is another than the run was trained on.
    """
    trained = load_trained(path, say)
    data = trained.folder.data(data)
    manifest = verified(data, stop)
    if manifest.id != trained.facts.data_id:
        raise ValueError(
            f"{data}: data set {manifest.id}, and {path} was trained on {trained.facts.data_id}; give --data"
        )
    stream = open_stream(data, manifest, "val")
    there = manifest.splits["val"].sequences
    if sequences is not None and not 1 <= sequences <= there:
        raise ValueError(f"--sequences {sequences}: the validation split has {there} sequences")
    found = evaluate(
        trained.model,
        stream,
        trained.tokenizer,
        sequences=sequences or there,
        length=manifest.sequence_length,
        micro=trained.facts.runtime.micro or 1,
        left=lambda: bool(stop),
    )
    if found is None:
        raise Interrupted(f"{path}: the evaluation was left; the same command starts it again")
    result = found.to_dict(trained.step)
    trained.folder.evals.mkdir(exist_ok=True)
    write_durably(trained.folder.evals / f"step-{trained.step}.json", (to_json(result) + "\n").encode())
    return result


def sample_run(
    path: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    say: Callable[[str], None],
) -> str:
    """The prompt and what the newest model adds to it. Without a seed each call draws anew."""
    trained = load_trained(path, say)
    ids = encode(trained.tokenizer, prompt)
    check(ids, temperature, top_p, trained.facts.sequence_length)
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)) if seed is None else seed)
    return continued(
        trained.model, trained.tokenizer, ids, tokens, trained.facts.sequence_length, temperature, top_p, generator
    )
