"""report.html: every run leaves one, it says what the logs say, and no text that it shows becomes part of the page."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.command import Command
from tests.train.dataset import build
from train import report
from train.metrics import read
from train.report import leave_report
from train.report.run import write_report

HOSTILE = '</div></style><script>document.title = "pwned"</script><img src="http://example.com/x" onerror="alert(1)">'
NAME = "<img src=x onerror=alert(1)> $\\frac{1}$ & co"
OURS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "b", "i", "code"),
    *("figure", "figcaption", "svg", "defs", "g", "path", "text", "use", "clippath", "rect"),
    *("table", "tr", "th", "td", "details", "summary"),
}


class Page(HTMLParser):
    """A page as a browser's parser takes it apart: its tags, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        tmp_path_factory.mktemp("hostile") / "set", train=120, val=10, length=128, texts=[HOSTILE], url='"><script>'
    )


@pytest.fixture(scope="module")
def run(train: Command, hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 of 24 steps on documents full of markup, with a NaN at step 7 and a spike at step 17."""
    path = tmp_path_factory.mktemp("report") / NAME
    planted = [("report",), ("short_window", 6, 6.0), ("poison", 7), ("spike", 5.0, 17)]
    done = train.run(hostile, path, "--steps", 20, faults=planted)
    assert (done.code, done.err) == (0, "")
    assert f"report     {path}/report.html" in done.out
    assert train("eval", path, "--sequences", 5).code == 0
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_report_says_what_the_logs_say(train: Command, hostile: Path, run: Path) -> None:
    done = train("report", run)
    assert (done.code, done.out, done.err) == (0, f"{run}/report.html\n", "")
    words = page_of(run).words
    lines, start = read(run / "metrics.jsonl"), json.loads((run / "run.json").read_text())["starts"][0]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    steps = [line for line in lines if line["kind"] == "train"]
    losses = [line["loss"] for line in steps if line["loss"] is not None]
    evaluation = json.loads((run / "evals" / "step-20.json").read_text())
    probe = [line for line in lines if line["kind"] == "probe"][-1]
    for said in (
        "tiny, BitNet b1.58: step 20 of 24, done",
        json.loads((hostile / "manifest.json").read_text())["id"],
        f"{last['val_loss']:.4f} validation loss at step 20",
        f"{last['val_bits_per_byte']:.4f} bits per byte there",
        f"{sum(losses) / len(losses):.4f} training loss, mean of the last 20 steps",
        f"{20 * 4 * 128:,} tokens predicted",
        "1 steps skipped",
        f"20 5 {evaluation['loss']:.4f} {evaluation['perplexity']:.2f} {evaluation['bits_per_byte']:.4f}",
        "0 to 20 of 20 asked for, done",
        "model.hidden 16",
        f"Every projection at step {probe['step']}",
        f"0 {100 * probe['layers'][0]['zero']:.2g}% {100 * probe['layers'][1]['zero']:.2g}%",
        start["argv"].split()[-1],
        start["processor"],
    ):
        assert " ".join(said.split()) in words, said
    assert start["commit"] is None or start["commit"] in words


def test_anomalies_are_shown_with_what_their_steps_saw(run: Path) -> None:
    words = page_of(run).words
    assert "Step 7: loss not finite, gradient norm not finite: no update was made (1 in a row)" in words
    lines = read(run / "anomalies.jsonl")
    spike = next(line for line in lines if line["kind"] == "spike" and line["step"] == 17)
    away = (spike["value"] - spike["mean"]) / spike["sigma"]
    assert f"Step 17: loss {spike['value']:.4f} is {away:.1f} σ above the mean of {spike['mean']:.4f}" in words
    for line in lines:
        for sequence in line["sequences"]:
            assert f"Sequence {sequence} " in words
    assert words.count('document.title = "pwned"') > 8


def test_a_data_set_that_is_gone_is_said_and_found_again(train: Command, hostile: Path, copy: Path) -> None:
    starts = json.loads((copy / "run.json").read_text())
    starts["starts"][-1]["data"] = "/nowhere/set"
    (copy / "run.json").write_text(json.dumps(starts))
    assert train("report", copy).code == 0
    words = page_of(copy).words
    assert "What they saw is not shown: /nowhere/set" in words and "Sequence" not in words
    assert "Step 7: loss not finite" in words
    assert train("report", copy, "--data", hostile).code == 0
    assert "Sequence" in page_of(copy).words


def test_nothing_that_a_text_holds_becomes_markup(run: Path) -> None:
    page = page_of(run)
    assert page.tags <= OURS, page.tags - OURS
    assert HOSTILE in page.words and NAME in page.words and '"><script>' in page.words
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} and not names & {"src", "href"}
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\0"), max_size=60)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_any_sample_is_shown_as_the_text_that_it_is(copy: Path, samples: list[tuple[str, str]]) -> None:
    lines = [{"step": 8, "prompt": prompt, "text": prompt + text} for prompt, text in dict(samples).items()]
    (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "metrics.jsonl").write_text("")  # charts take time
    (copy / "anomalies.jsonl").write_text("")
    write_report(copy)
    page = page_of(copy)
    assert page.tags <= OURS
    whole = "".join(page.texts)
    for line in lines:
        assert line["text"] in whole


def test_half_a_surrogate_pair_in_a_sample_does_not_stop_a_report(copy: Path) -> None:
    (copy / "samples.jsonl").write_text('{"step": 8, "prompt": "The", "text": "The \\ud83d end"}\n')
    write_report(copy)
    assert "The ? end" in "".join(page_of(copy).texts)


def test_an_interrupted_run_leaves_its_report_too(train: Command, data: Path, tmp_path: Path) -> None:
    done = train.run(data, tmp_path / "run", faults=[("report",), ("signal_in", "step", 9, 15)])
    assert done.code == 75 and done.err.count("\n") == 1
    assert "step 9 of 24, interrupted" in page_of(tmp_path / "run").words


def test_a_report_that_fails_leaves_the_run_as_it_is(train: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html.tmp").mkdir(parents=True)  # what the report is written to first
    (tmp_path / "run" / "config.json").write_text("{")
    done = train.run(data, tmp_path / "run", "--restart", "--steps", 2, faults=[("report",)])
    assert (done.code, done.err) == (0, "")
    assert "no report: " in done.out and "done: step 2" in done.out


@pytest.mark.parametrize("error", [ZeroDivisionError(), MemoryError(), KeyError("loss"), ImportError("libfreetype")])
def test_not_even_a_bug_in_a_report_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(path: Path, data: Path | None = None) -> Path:
        raise error

    monkeypatch.setattr(report, "report", broken)
    line = leave_report(Path("run"))
    assert line.startswith("no report: ") and "\n" not in line and len(line) > len("no report: ")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_packages_a_run_ends_well_and_says_what_to_install(
    train: Command, data: Path, tmp_path: Path, package: str
) -> None:
    run, absent = tmp_path / "run", ("without", package)
    done = train.run(data, run, "--steps", 2, faults=[("report",), absent])
    assert (done.code, done.err) == (0, "")
    told = f"pip install jinja2 matplotlib; then python -m train report {run}"
    assert next(line for line in done.out.splitlines() if line.startswith("no report: ")).endswith(told)
    done = train("report", run, faults=[absent])
    assert (done.code, done.out) == (1, "") and done.err.endswith(f"{told}\n") and done.err.count("\n") == 1


def cut_short(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-20])


def damaged_in_the_middle(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:9], b"\0\0\0\n", *lines[10:]]))


def only_begun(log: Path) -> None:
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:1]))


@pytest.mark.parametrize(
    ("break_", "step", "said"),
    [
        (cut_short, 20, "step 20 of 24"),
        (damaged_in_the_middle, 7, "metrics.jsonl: line 10 is damaged; what follows it is left out here"),
        (only_begun, 1, "step 1 of 24"),
        (Path.unlink, 0, "No step is recorded yet."),
    ],
    ids=["a torn last line", "a damaged line", "one step", "no step"],
)
def test_a_run_in_any_state_has_a_report(
    train: Command, copy: Path, break_: Callable[[Path], None], step: int, said: str
) -> None:
    break_(copy / "metrics.jsonl")
    done = train("report", copy)
    assert (done.code, done.err) == (0, "")
    words = page_of(copy).words
    assert said in words and f"step {step} of 24" in words


def test_a_run_in_progress_is_not_called_done(train: Command, copy: Path) -> None:
    starts = json.loads((copy / "run.json").read_text())
    for name in ("ended", "outcome", "last_step"):
        del starts["starts"][-1][name]
    (copy / "run.json").write_text(json.dumps(starts))
    assert train("report", copy).code == 0
    assert "step 20 of 24, running, or killed" in page_of(copy).words


def test_the_twin_is_shown_without_what_only_codes_have(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(data, run, "--steps", 8, settings={"model.quantization": "none"}, faults=[("report",)]).code == 0
    words = page_of(run).words
    assert "tiny, full precision: step 8 of 24" in words and "Activation absmax, by layer" in words
    assert "Zeros" not in words and "Flipped" not in words


def test_a_run_that_only_saw_nan_has_a_report(train: Command, data: Path, tmp_path: Path) -> None:
    done = train.run(data, tmp_path / "run", faults=[("report",), ("poison", 1, 2, 3, 4, 5)])
    assert done.code == 3 and "report     " in done.out
    assert "step 5 of 24, stopped on anomalies" in page_of(tmp_path / "run").words


def test_a_run_without_validation_has_a_report(train: Command, tmp_path: Path) -> None:
    data = build(tmp_path / "set", train=120, val=0)
    assert train.run(data, tmp_path / "run", "--steps", 8, faults=[("report",)]).code == 0
    assert "Validation" not in page_of(tmp_path / "run").words


def test_sixty_thousand_steps_are_a_page_of_less_than_a_megabyte(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["schedule"] |= {"middle_step": 30_000, "total_steps": 60_000}
    (copy / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = read(copy / "metrics.jsonl")
    line = next(line for line in lines if line["kind"] == "train")
    noise = [((n * 7919) % 1000) / 1000 for n in range(60_000)]
    (copy / "metrics.jsonl").write_text(
        "".join(
            json.dumps({**line, "step": n + 1, "loss": 3 + x, "grad_norm": x or None}) + "\n"
            for n, x in enumerate(noise)
        )
    )
    write_report(copy)
    assert (copy / "report.html").stat().st_size < 400_000
    words = page_of(copy).words
    assert "step 60,000 of 60,000" in words and "mean and extremes of 167 steps" in words


def test_a_folder_without_a_run_is_refused_in_one_line(train: Command, tmp_path: Path) -> None:
    done = train("report", tmp_path)
    assert done.code == 1 and "no run here" in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
