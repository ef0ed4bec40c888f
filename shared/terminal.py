"""What may be shown on a terminal: a web page, and a model that has read some, may hold what a terminal obeys."""

import json


def printable(text: str) -> str:
    """`text` with JSON's escape (\\u001b) for every character that does not print, but for line breaks and tabs.

    Of a JSON text the result is the same JSON value.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else json.dumps(c)[1:-1] for c in text)
