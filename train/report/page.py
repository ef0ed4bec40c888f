"""A page as one file: no script, no network, light or dark as the reader's system is. Every text is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from shared.durable import write_durably
from train.metrics import number

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """A chart with its title, a legend of (words, colour), and a sentence on how to read it."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    caption: str = ""


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render `template`, which stands beside this file, and put it at `path` whole."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["num"] = number
    text = pages.get_template(template).render(css=(HERE / "page.css").read_text(), **values)
    write_durably(path, text.encode("utf-8", "replace"))  # half a surrogate pair is no text that UTF-8 can hold
