"""One export: opened, written aside, proven from what is on disk, and only then given its name.

A format is a module with `write(source, out, options)` and `prove(source, out, options)`. `prove` loads what was
written by the library that people will use, compares it with our own forward, and returns a line for each thing it has
found to hold, or raises a ValueError. An export whose proof fails leaves nothing behind.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from shared.durable import exclusive, fsync_folder
from train.export.source import Source, open_source

# What each format imports beyond the core; the extra of pyproject.toml that brings it has the format's name.
NEEDS = {"hf": ("transformers", "accelerate"), "gguf": ("gguf",)}
# What each format can be, the default first.
VARIANTS = {"hf": ("latent", "packed"), "gguf": ("tq2_0", "f16", "f32")}


@dataclass(frozen=True)
class Options:
    """How a format is written."""

    variant: str  # one of the format's VARIANTS


class Format(Protocol):
    """train/export/hf.py and train/export/gguf.py."""

    def write(self, source: Source, out: Path, options: Options) -> None:
        """Write the export as the file or folder `out`, which does not exist yet."""

    def prove(self, source: Source, out: Path, options: Options) -> list[str]:
        """Load `out` from disk and compare; what holds, a line each. ValueError when anything does not."""


def export(run: Path, name: str, out: Path, variant: str | None, say: Callable[[str], None]) -> list[str]:
    """Export the newest valid checkpoint of `run` in the format `name` as `out`; the lines of its proof.

    ValueError when `out` is there, the extra is missing, or the proof fails; then nothing is left behind.
    """
    options = Options(variant or VARIANTS[name][0])
    if options.variant not in VARIANTS[name]:
        raise ValueError(f"--variant {variant}: --format {name} can be {' or '.join(VARIANTS[name])}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: is there already; name another --out, or remove it first")
    form = load_format(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out.with_name(out.name + ".lock"), "export"):
        aside = out.with_name(out.name + ".partial")
        remove(aside)
        try:
            source = open_source(run, say)
            form.write(source, aside, options)
            proven = form.prove(source, aside, options)
            if out.is_dir():
                out.rmdir()
            aside.rename(out)
        except BaseException:
            remove(aside)
            raise
        fsync_folder(out.parent)
    return proven


def load_format(name: str) -> Format:
    """The module of a format. ValueError when a package that it needs is not installed."""
    for package in NEEDS[name]:
        if find_spec(package) is None:
            raise ValueError(
                f"--format {name} needs the package {package}, which is not installed here: pip install '.[{name}]'"
            )
    return cast(Format, import_module(f"train.export.{name}"))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
