"""What may be shown on a terminal: a web page, and a model that has read some, may hold what a terminal obeys."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without \t and \n, DEL, C1


def printable(text: str) -> str:
    """The text with control characters, other than line break and tab, as \\x1b and the like."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
