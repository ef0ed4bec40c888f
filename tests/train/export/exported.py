"""Runs of a few steps, and their exports to Transformers, made once for all tests of a process."""

from pathlib import Path

from tests.train.command import Command
from train.export import hf
from train.export.command import Options
from train.export.source import Source, open_source

FORMS = ("latent", "packed", "twin")


def trained(train: Command, data: Path, run: Path, quantization: str) -> Path:
    """A run of TINY after 6 of its 24 steps; enough that no norm's weight is one."""
    settings: dict[str, object] = {
        "model.quantization": quantization,
        "schedule.peak_lr": 0.05,
        "schedule.warmup_steps": 1,
    }
    done = train.run(data, run, "--steps", 6, settings=settings)
    assert done.code == 0, done.err
    return run


class Exports:
    """Where each form of the export stands, and what it was made from."""

    def __init__(self, folder: Path, bitnet: Path, twin: Path) -> None:
        self.folder = folder
        self.sources = {name: open_source(path, print) for name, path in (("bitnet", bitnet), ("twin", twin))}
        for form in FORMS:
            hf.write(self.source(form), self.path(form), self.options(form))

    def source(self, form: str) -> Source:
        return self.sources["twin" if form == "twin" else "bitnet"]

    def path(self, form: str) -> Path:
        return self.folder / form

    def options(self, form: str) -> Options:
        return Options("packed" if form == "packed" else "latent")
