"""Standard input and output of any kind: in any encoding, closed, or of a closed terminal."""

import os
import sys
from typing import Any, TextIO

from ysnake.shared.errors import InputError


def prepare() -> None:
    """Write characters that the output's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def read_input() -> str:
    """All of standard input.

    Raises:
        InputError: it is not text in the encoding that Python expects.
    """
    if sys.stdin is None:  # closed by whoever started this process
        return ""
    try:
        return check_text(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise not_text("standard input", error.start, error.encoding) from error


def ask(prompt: str) -> str:
    """A line that is typed.

    Raises:
        InputError: it is not text in the encoding that Python expects.
    """
    try:
        return check_text(input(prompt), "this line")
    except UnicodeDecodeError as error:
        raise not_text("this line", error.start, error.encoding) from error


def check_text(text: str, name: str) -> str:
    """The text, unless a part of it could not be decoded; Python then leaves half a surrogate pair.

    Raises:
        InputError: that names where the text came from.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = len(text[: error.start].encode())
        raise not_text(name, start, sys.getfilesystemencoding()) from error
    return text


def not_text(name: str, byte: int, encoding: str) -> InputError:
    return InputError(
        f"{name}: byte {byte:,} is not {encoding.upper()}; convert the text, for example with "
        "iconv -f latin1 -t utf-8"
    )


class LastingOutput:
    """A stream that a long job may lose: once its reader or terminal is gone, text is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Send what is written from now on, and what still waits in the stream, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
