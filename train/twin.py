"""The full-precision twin of a run: the same parameters, data, order, schedule and seed, and no quantisation."""

from pathlib import Path

from train import checkpoint, config
from train.run import Request
from train.run_folder import RunFolder


def twin_of(path: Path, data: Path | None = None) -> Request:
    """What trains the twin of the run at `path`, as RUN-twin beside it, up to the step that the run has saved last.

    All settings are those of the run, its micro-batch among them, so that nothing but the quantisation differs. The
    data set is that of the run's last start, or `data`. ValueError when there is no such run, or nothing to compare.
    """
    folder = RunFolder(path)
    facts = folder.facts()
    if facts.config.model.quantization == "none":
        raise ValueError(f"{path}: is in full precision already; name the BitNet run")
    steps = checkpoint.steps_in(folder.checkpoints)
    if not steps:
        raise ValueError(f"{path}: has no checkpoint yet; the twin goes as far as the run has come: train it first")
    settings = config.flatten(config.to_dict(facts.config))
    preset = settings.pop("preset")
    settings |= {"model.quantization": "none", "batch.micro": facts.runtime.micro}
    return Request(
        preset=preset,
        data=folder.data(data),
        run=path.with_name(path.resolve().name + "-twin"),
        steps=steps[-1],
        settings=[f"{name}={value}" for name, value in settings.items()],
        device=facts.runtime.device,
    )
