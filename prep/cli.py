"""python -m prep: the commands. Thin: each imports what it runs, so that --help is quick."""

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.defaults import SOURCE, TOKENIZER, pinned_sha256

if TYPE_CHECKING:
    from shared.progress import Progress

SRC = "hf://OWNER/NAME[@REVISION][?config=NAME], or a file, folder or glob of .parquet, .jsonl, .jsonl.zst, .txt"
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(min=1)


JOB_OPTIONS = [
    click.option("--source", default=SOURCE, help=f"{SRC} [default: FineWeb-Edu's sample-10BT, pinned]"),
    click.option(
        "--tokenizer",
        default=TOKENIZER,
        help="hf://OWNER/NAME[@REVISION]/FILE.model or a .model file  [default: LLaMA-2's]",
    ),
    click.option("--out", required=True, type=FOLDER, help="folder of the data set; built as OUT.partial"),
    click.option("--train-sequences", type=COUNT, default=1_920_000, show_default=True),
    click.option("--val-sequences", type=click.IntRange(min=0), default=10_240, show_default=True),
    click.option(
        "--seq-len", "sequence_length", type=COUNT, default=1024, show_default=True, help="tokens a sequence predicts"
    ),
    click.option("--shard-tokens", type=COUNT, default=1 << 26, show_default=True, help="tokens a shard, but the last"),
    click.option("--order", type=click.Choice(["shuffled", "listed"]), default="shuffled", show_default=True),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of order and holdout"),
    click.option("--workers", type=COUNT, default=None, help="processes that encode [default: one a core, at most 8]"),
    click.option("--unit-bytes", type=COUNT, default=8 << 20, show_default=True, help="packed bytes read at once"),
    click.option("--restart", is_flag=True, help="discard an unfinished build"),
]


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `plan` and `tokenize` both take: what is built, and where. As `shape` come the fields of `Settings`."""
    for option in reversed(JOB_OPTIONS):
        command = option(command)
    return command


def _dask_address(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"dask://[^/:\s]+(:\d+)?", value):
        raise click.BadParameter(f"{value}: expected dask://HOST[:PORT], the address of a Dask scheduler")
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Pre-tokenise text into memory-mapped uint16 shards with a hashed manifest."""


@main.command()
@job_options
@click.option(
    "--executor",
    metavar="dask://HOST[:PORT]",
    default=None,
    callback=_dask_address,
    help="encode on the workers of this Dask scheduler; --workers says how many to count on [default: those there]",
)
def tokenize(
    source: str, tokenizer: str, out: Path, workers: int | None, restart: bool, executor: str | None, **shape: Any
) -> None:
    """Build a data set of exactly the tokens a job consumes. The same command goes on after an interruption."""
    from shared.stop import Stop

    with Stop().listening() as stop:  # before the slow imports, so that a signal never finds us unprepared
        from prep.pipeline import build
        from prep.plan import Settings
        from prep.sources import tokenizer_file
        from shared.tokenizer import load_tokenizer

        manifest = build(
            source,
            load_tokenizer(tokenizer_file(tokenizer, stop=stop), pinned_sha256(tokenizer)),
            Settings(**shape),
            out,
            workers=workers or (0 if executor else min(8, _cores())),
            restart=restart,
            stop=stop,
            tokenizer_spec=tokenizer,
            executor=executor,
        )
    for name, split in manifest.splits.items():
        click.echo(
            f"{name}: {split.sequences:,} sequences, {split.tokens:,} tokens, {split.documents:,} documents, "
            f"{split.utf8_bytes:,} bytes of text, {len(split.shards)} shards"
        )
    skipped = manifest.skipped
    click.echo(
        f"skipped: {skipped.empty:,} empty, {skipped.in_val:,} in val, {skipped.after_full:,} after train was full"
    )
    click.echo(f"id: {manifest.id}")


@main.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="print one JSON object and nothing else")
def plan(
    source: str, tokenizer: str, out: Path, workers: int | None, restart: bool, as_json: bool, **shape: Any
) -> None:
    """Tell what tokenize with the same options will read, download, write and take. Changes nothing."""
    from shared.stop import Stop

    with Stop().listening() as stop:
        from prep.forecast import plan as plan_
        from prep.plan import Settings
        from prep.sources import tokenizer_file
        from shared.tokenizer import load_tokenizer

        progress = _progress(as_json)
        forecast = plan_(
            source,
            load_tokenizer(tokenizer_file(tokenizer, stop=stop, progress=progress), pinned_sha256(tokenizer)),
            Settings(**shape),
            out,
            workers=workers or min(8, _cores()),
            restart=restart,
            stop=stop,
            progress=progress,
        )
    for line in [json.dumps(forecast.json())] if as_json else forecast.lines():
        click.echo(line)


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--deep", type=click.IntRange(min=0), default=0, help="also encode this many documents anew")
@click.option("--source", default=None, help="where --deep finds the source [default: where it was]")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object and nothing else")
def verify(folder: Path, deep: int, source: str | None, as_json: bool) -> None:
    """Hash and check every file of the data set FOLDER; name all that are bad."""
    from prep.verify import verify as verify_

    result = verify_(folder, deep=deep, source=source, progress=_progress(as_json))
    if as_json:
        click.echo(json.dumps(result.json(), ensure_ascii=False))
    for problem in [] if as_json else result.bad:
        click.echo(f"{problem.file}: {problem.problem}")
    if not result.ok:
        files = ", ".join(problem.file for problem in result.bad)
        raise click.ClickException(f"{folder}: bad: {files}; prep repair makes them anew")
    if not as_json:
        again = f", {result.reencoded} documents encoded anew" if deep else ""
        click.echo(f"{folder}: every file is as recorded{again}; id: {result.id}")


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--source", default=None, help="where the texts are [default: where they were]")
@click.option("--tokenizer", default=None, help="where tokenizer.model is, if that is bad [default: where it was]")
@click.option("--workers", type=COUNT, default=None, help="processes, where all must be built again")
def repair(folder: Path, source: str | None, tokenizer: str | None, workers: int | None) -> None:
    """Make what verify finds bad in the data set FOLDER anew, each file as the manifest states it."""
    from shared.stop import Stop

    with Stop().listening() as stop:
        from prep.repair import Repair

        bad = Repair(folder, source, tokenizer, workers or min(8, _cores()), stop).run()
    click.echo(f"{folder}: {'whole again' if bad else 'every file is as recorded, nothing to repair'}")


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--token", type=int, default=None, help="index of a token in the split")
@click.option("--sequence", type=int, default=None, help="index of a sequence in the split")
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object and nothing else")
def inspect(folder: Path, token: int | None, sequence: int | None, split: str, as_json: bool) -> None:
    """Show the text at a token or in a sequence of the data set FOLDER, and where it comes from."""
    if (token is None) == (sequence is None):
        raise click.UsageError("give either --token or --sequence", click.get_current_context())
    from prep.inspect import inspect as inspect_

    view = inspect_(folder, split, token=token, sequence=sequence)
    for line in [json.dumps(view.json())] if as_json else view.lines():
        click.echo(line)


@main.command("sample-corpus")
@click.option("--out", required=True, type=FOLDER, help="folder for the corpus and its tokenizer.model")
def sample_corpus(out: Path) -> None:
    """Write an offline stand-in for FineWeb-Edu: English prose that this Python installation holds."""
    from prep.sample_corpus import write_sample_corpus

    sample = write_sample_corpus(out)
    what = "wrote" if sample.new else "already complete:"
    click.echo(
        f"{out}: {what} {sample.documents:,} documents, {sample.characters:,} characters, {sample.tokens:,} tokens"
    )
    click.echo(f"use it with --source {out} --tokenizer {out / 'tokenizer.model'}")


def _progress(as_json: bool) -> "Progress":
    """Where a command shows what it waits for: nowhere, when stdout is for one JSON object and nothing else."""
    from shared.progress import Progress

    return Progress(io.StringIO() if as_json else None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
