"""What is exported: a run's newest valid checkpoint in fp32 on the CPU, its tokenizer, and where both come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.tokenizer import Tokenizer
from train.config import ModelConfig
from train.metrics import undamaged
from train.model import Model
from train.run_folder import Facts
from train.trained import load_trained


@dataclass(frozen=True)
class Source:
    """`model` is on the CPU with fp32 parameters and products, its codes fresh."""

    name: str  # of the run
    model: Model
    tokenizer: Tokenizer  # of the run
    facts: Facts  # config.json: settings, data id, sequence length
    step: int  # updates that the model has seen
    provenance: dict[str, Any]  # plain JSON: what a model card says

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def quantized(self) -> bool:
        """False for the full-precision twin."""
        return self.config.quantization == "bitnet"


def open_source(run: Path, say: Callable[[str], None]) -> Source:
    """The newest checkpoint of a run that verifies, of one in progress too. ValueError when there is none."""
    trained = load_trained(run, say)
    model = Model(trained.model.config, torch.float32)
    model.load_state_dict(trained.model.state_dict())
    model.requantize()
    starts = trained.folder.starts()
    provenance = {
        "run": run.resolve().name,
        "step": trained.step,
        "steps_planned": trained.facts.config.schedule.total_steps,
        "tokens": trained.step * trained.facts.config.batch.sequences * trained.facts.sequence_length,
        "data_id": trained.facts.data_id,
        "sequence_length": trained.facts.sequence_length,
        "tokenizer_sha256": trained.tokenizer.identity.sha256,
        "commit": starts[-1].get("commit") if starts else None,
        "losses": losses(trained.folder.metrics, trained.step),
    }
    return Source(run.resolve().name, model, trained.tokenizer, trained.facts, trained.step, provenance)


def losses(metrics: Path, step: int) -> dict[str, Any]:
    """What the log knows at `step`: its train loss, and the newest validation up to there; empty without a log."""
    found: dict[str, Any] = {}
    for line in undamaged(metrics):
        if line["kind"] == "train" and line["step"] == step:
            found["train_loss"] = line["loss"]
        if line["kind"] == "eval" and line["step"] <= step:
            found["val_loss"], found["val_step"] = line["val_loss"], line["step"]
            found["val_bits_per_byte"] = line["val_bits_per_byte"]
    return found
