"""A run as one page that opens anywhere: report.html, and one that compares two. Needs the extra `report`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shared.stop import one_line

if TYPE_CHECKING:
    from train.compare import Comparison

PACKAGES = ("jinja2", "matplotlib")


def report(path: Path, data: Path | None = None) -> Path:
    """Write report.html of the run at `path`, and return where.

    The data set, for the documents of anomalies, is that of the last start, or `data`. ValueError when there is no run,
    or when the packages for pages are missing.
    """
    with needing_packages(f"python -m train report {path}"):
        from train.report.run import write_report
    return write_report(path, data)


def leave_report(path: Path) -> str:
    """`report` at the end of a run: the line that says where it is, or why there is none. It never raises."""
    try:
        return f"report     {report(path)}"
    except Exception as error:  # noqa: BLE001 - not even a bug in a chart may turn a good run into a failed one
        return f"no report: {one_line(error) or type(error).__name__}"


def comparison_page(found: "Comparison", out: Path | None) -> tuple[Path | None, str | None]:
    """Write the page of a comparison: where it is, or why there is none; what was found stands without it."""
    a, b = found.pairs[0]
    place = out or a.path.parent / f"compare-{a.path.resolve().name}-{b.path.resolve().name}.html"
    command = f"python -m train compare {a.path} {b.path}"
    command += "".join(f" --pair {one.path} {other.path}" for one, other in found.pairs[1:])
    try:
        with needing_packages(command):
            from train.report.comparison import write_comparison
        return write_comparison(found, place, command), None
    except (ValueError, OSError) as error:
        return None, f"{error}"


@contextmanager
def needing_packages(command: str) -> Iterator[None]:
    """Turn the lack of a package of the extra into a ValueError that says what to type before `command`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise ValueError(f"a page needs more packages: pip install {' '.join(PACKAGES)}; then {command}") from None
