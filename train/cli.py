"""The commands of stage two. Thin: each turns its arguments into one call; heavy imports wait until then."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shared.stop import ANOMALIES, DONE, FAILED, Stop, one_line

if TYPE_CHECKING:
    from train.run import Request

FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Train on a data set that prep has made, evaluate, sample."""


@main.command()
@click.option("--preset", default="95m", show_default=True, metavar="95m|tiny", help="the model and its schedule")
@click.option("--data", type=FOLDER, help="verify this data set as well, and see whether it lasts")
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), help="tokens a second, to tell the time it takes")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="as for run")
@click.option("--json", "as_json", is_flag=True, help="one JSON object and nothing else")
def plan(preset: str, data: Path | None, speed: float | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Say what a job will be: parameters, tokens, FLOPs, schedule, memory, disk, time. Nothing is written."""
    with Stop().listening() as stop:
        from train import config
        from train.metrics import to_json
        from train.plan import plan as make_plan
        from train.plan import table
        from train.run import verified

        wanted = config.apply_settings(config.preset(preset), settings)
        found = make_plan(wanted, verified(data, stop) if data else None, speed)
    click.echo(to_json(found.to_dict()) if as_json else "\n".join(table(found)))
    if found.data and not found.data.enough:
        raise ValueError(
            f"{data}: the schedule takes {found.sequences} sequences and the train split has {found.data.sequences}: "
            f"tokenize more, or train with --steps {found.data.sequences // found.batch} or less"
        )


@main.command()
@click.option("--preset", required=True, metavar="95m|tiny", help="the model and its schedule")
@click.option("--data", required=True, type=FOLDER, help="the data set: data/<name>")
@click.option("--run", "path", required=True, type=FOLDER, help="the run: runs/<id>, new or to go on with")
@click.option("--steps", type=COUNT, help="stop after this step, with a checkpoint; the schedule stays as it is")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="change a setting, as named in config.json"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--restart", is_flag=True, help="throw away what this run has and start anew")
@click.option("--tensorboard", is_flag=True, help="write the metrics for TensorBoard as well (needs the extra)")
@click.option("--elastic", is_flag=True, help="go on with another number of processes: same order, other bits")
def run(
    preset: str,
    data: Path,
    path: Path,
    steps: int | None,
    settings: tuple[str, ...],
    device: str,
    restart: bool,
    tensorboard: bool,
    elastic: bool,
) -> int:
    """Train, or go on with a run: the same command again continues from its newest checkpoint.

    Ctrl-C is safe: the state is saved first. Exit codes: 0 done, 1 failed, 3 stopped on anomalies, 75 interrupted.
    """
    with Stop().listening() as stop:
        from train.run import Request

        return _train(Request(preset, data, path, steps, settings, device, restart, tensorboard, elastic), stop)


@main.command("eval")
@click.argument("path", metavar="RUN", type=FOLDER)
@click.option("--sequences", type=COUNT, help="only the first N of the validation split")
@click.option("--data", type=FOLDER, help="where the data set is, if it has moved since the last start")
@click.option("--json", "as_json", is_flag=True, help="one JSON object and nothing else")
def evaluate(path: Path, sequences: int | None, data: Path | None, as_json: bool) -> None:
    """Evaluate a run's newest checkpoint on the validation split."""
    with Stop().listening() as stop:
        from train.metrics import to_json
        from train.trained import evaluate_run

        found = evaluate_run(path, sequences=sequences, data=data, stop=stop, say=_say_on_stderr)
    if as_json:
        click.echo(to_json(found))
        return
    for name in ("step", "sequences", "tokens", "loss", "perplexity", "bits_per_byte"):
        click.echo(f"{name} {found[name]}")


@main.command()
@click.argument("path", metavar="RUN", type=FOLDER)
@click.option("--prompt", required=True, help="the beginning of the text")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: the likeliest")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--tokens", type=COUNT, default=100, show_default=True, help="at most so many are added")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="the same seed gives the same text")
def sample(path: Path, prompt: str, temperature: float, top_p: float, tokens: int, seed: int | None) -> None:
    """Let a run's newest checkpoint go on with a text."""
    from shared.terminal import printable
    from train.trained import sample_run

    text = sample_run(path, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, say=_say_on_stderr)
    click.echo(printable(text))


@main.command()
@click.argument("path", metavar="RUN", type=FOLDER)
@click.option("--step", required=True, type=COUNT, help="any step of the schedule, made or still to come")
@click.option("--data", type=FOLDER, help="where the data set is, if it has moved since the last start")
@click.option("--json", "as_json", is_flag=True, help="one JSON object and nothing else")
def inspect(path: Path, step: int, data: Path | None, as_json: bool) -> None:
    """Show what a step sees: sequences, their documents, and the text. A (long) line a sequence; try | less -S."""
    from shared.terminal import printable
    from train.inspect import inspect as look_up
    from train.metrics import to_json

    seen = look_up(path, step, data)
    click.echo(printable(to_json(seen.json())) if as_json else "\n".join(seen.lines()))


@main.command()
@click.argument("path", metavar="RUN", type=FOLDER)
def summary(path: Path) -> None:
    """Say how far a run is, what it has reached, how fast it is, and what it writes."""
    from train.summary import summary as lines

    click.echo("\n".join(lines(path)))


@main.command()
@click.argument("path", metavar="RUN", type=FOLDER)
@click.option("--data", type=FOLDER, help="where the data set is, if it has moved since the last start")
def report(path: Path, data: Path | None) -> None:
    """Write RUN/report.html: what was run, curves, ternary health, anomalies, samples. Every run ends with it."""
    from train.report import report as write_report

    click.echo(write_report(path, data))


@main.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--pair", "more", nargs=2, multiple=True, type=FOLDER, metavar="A B", help="the same with another seed")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="the page; default: compare-A-B.html by A")
@click.option("--json", "as_json", is_flag=True, help="one JSON object and nothing else")
def compare(a: Path, b: Path, more: tuple[tuple[Path, Path], ...], out: Path | None, as_json: bool) -> int:
    """Compare two runs.

    With equal configs all that both have recorded must be equal: the first difference is named, and the exit code is 1.
    Otherwise the settings that differ, the gap in loss and bits per byte at equal steps, and a page with both curves.
    With --pair (any number) the gap is the mean over pairs with its standard error; a pair shares its seed.
    """
    from train.compare import compare as compare_runs
    from train.compare import told
    from train.metrics import to_json
    from train.report import comparison_page

    found = compare_runs([(a, b), *more])
    page, missing = (None, None) if found.same and not out else comparison_page(found, out)
    if as_json:
        click.echo(to_json({**found.to_dict(), "page": str(page) if page else None}))
    else:
        click.echo("\n".join([*told(found), *([f"page       {page}"] if page else [])]))
    if missing:
        _say_on_stderr(f"no page: {missing}")
    return FAILED if found.failed else DONE


@main.command()
@click.argument("path", metavar="RUN", type=FOLDER)
@click.option("--data", type=FOLDER, help="where the data set is, if it has moved since the last start")
def twin(path: Path, data: Path | None) -> int:
    """Train RUN's full-precision twin as RUN-twin: same data, order, schedule and seed, as far as RUN has come.

    Again after an interruption, or when RUN has gone on. Then: compare RUN RUN-twin.
    """
    with Stop().listening() as stop:
        from train.twin import twin_of

        return _train(twin_of(path, data), stop)


@main.command()
@click.argument("path", metavar="RUN", type=FOLDER)
@click.option("--format", "name", required=True, type=click.Choice(["hf", "gguf"]), help="Transformers or llama.cpp")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="the folder (hf) or file (gguf) to make")
@click.option(
    "--variant",
    type=click.Choice(["latent", "packed", "tq2_0", "f16", "f32"]),
    help="hf: latent (default), fp32 weights that can be trained further, or packed, 2-bit codes; "
    "gguf: tq2_0 (default), 2-bit codes, f16 or f32",
)
def export(path: Path, name: str, out: Path, variant: str | None) -> None:
    """Write a run's newest checkpoint for other programs; refused when they would say something else."""
    from train.export.command import export as write_export

    for line in write_export(path, name, out, variant, _say_on_stderr):
        click.echo(line)


def _train(request: "Request", stop: Stop) -> int:
    """Train as asked; the exit code."""
    from train.run import run as run_training
    from train.training import TooManyAnomalies

    try:
        run_training(request, stop)
    except TooManyAnomalies as error:
        _say_on_stderr(f"error: {error}")
        return ANOMALIES
    return DONE


@main.command()
@click.option("--preset", default="95m", show_default=True, metavar="95m|tiny", help="the model and its batch")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--rounds", type=COUNT, default=3, show_default=True, help="of which the medians are taken")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="as for run")
@click.option("--json", "as_json", is_flag=True, help="one JSON object and nothing else")
def bench(preset: str, device: str, rounds: int, settings: tuple[str, ...], as_json: bool) -> None:
    """Measure the speed of training: BitNet, its full-precision twin, a textbook BitLinear. Nothing is written."""
    from train import config
    from train.bench import bench as measure
    from train.bench import table
    from train.metrics import to_json

    found = measure(config.apply_settings(config.preset(preset), settings), device, rounds)
    click.echo(to_json(found) if as_json else "\n".join(table(found)))


def _say_on_stderr(line: str) -> None:
    sys.stdout.flush()
    print(one_line(line), file=sys.stderr, flush=True)
