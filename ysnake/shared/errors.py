"""The error of every command for input that cannot work."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ysnake.shared.shown import escape_controls


class InputError(ValueError):
    """The user gave something that cannot work. The message is one line.

    A name in a foreign file may hold line breaks and escape sequences. The message escapes them.

    Attributes:
        field: what is at fault, by the name that the user knows: an option such as "--top-p", or a
            size in a config.json; empty where the reason itself names a file or several things.
        reason: what is wrong with it. The message is "FIELD: REASON".
    """

    def __init__(self, reason: str, field: str = ""):
        super().__init__(escape_controls(f"{field}: {reason}" if field else reason))
        self.reason, self.field = escape_controls(reason), field


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.rstrip("_").replace("_", "-")


def why(error: OSError) -> str:
    """What is wrong with a file, in a line. On a full disk it says what helps."""
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return f"{said}; free some space there, or choose another folder"
    return said


@contextmanager
def named_as_in_python(names: Iterable[str]) -> Iterator[None]:
    """Let an InputError in this block say max_steps instead of --max-steps.

    Args:
        names: the arguments that the caller has.
    """
    python = {option(name): name for name in names}

    def respelled(text: str) -> str:
        return re.sub(r"--[a-z-]+", lambda found: python.get(found[0], found[0]), text)

    try:
        yield
    except InputError as error:
        error.reason, error.field = respelled(error.reason), respelled(error.field)
        error.args = (respelled(str(error)),)
        raise
