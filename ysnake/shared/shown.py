"""How messages show numbers, commands, and foreign text with its control characters escaped."""

import os
import re
import shlex
import subprocess

# C0 and C1 controls, line and paragraph separators, changes of direction, halves of surrogate pairs
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    """Replace each control character by its Python escape, ESC by \\x1b.

    Args:
        text: from a file, a model, a server or an error message.
        keep: characters that stay unchanged. A text of several lines keeps "\\n\\t".
    """

    def escape(found: re.Match) -> str:
        character = found[0]
        return character if character in keep else character.encode("unicode_escape").decode()

    return _CONTROLS.sub(escape, text)


def amount(number: int, noun: str) -> str:
    """A number of things: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def as_argument(value: object) -> str:
    """The text of a value, quoted for the command line where that is necessary."""
    return subprocess.list2cmdline([str(value)]) if os.name == "nt" else shlex.quote(str(value))
