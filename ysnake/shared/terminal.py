"""Standard input and output that may have any encoding, be closed, or lose their terminal."""

import os
import sys
from typing import Any, TextIO

from ysnake.shared.errors import InputError

WINDOWS = os.name == "nt"


def prepare() -> None:
    """Print characters that the encoding of the output lacks as escapes, instead of failing.

    On Windows files and pipes get and give UTF-8, as elsewhere, unless PYTHONIOENCODING is set.
    Python's default there is an encoding that lacks most characters.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not hasattr(stream, "reconfigure"):
            continue
        if WINDOWS and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            stream.reconfigure(encoding="utf-8")
        if stream is not sys.stdin:
            stream.reconfigure(errors="backslashreplace")


def read_input() -> str:
    """All of standard input.

    Raises:
        InputError: the input is not text in the encoding that Python expects.
    """
    if sys.stdin is None:  # the parent process closed it
        return ""
    try:
        return check_text(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise not_text("standard input", error.start, error.encoding) from error


def ask(prompt: str) -> str:
    """Ask for a line of text in the terminal.

    Raises:
        EOFError: the input has ended.
        InputError: the line is not text in the encoding that Python expects.
    """
    if sys.stdin is None:  # the parent process closed it
        raise EOFError
    try:
        return check_text(input(prompt), "this line")
    except UnicodeDecodeError as error:
        raise not_text("this line", error.start, error.encoding) from error


def check_text(text: str, name: str) -> str:
    """Return the text if all of it could be decoded.

    Python marks an undecodable byte by half of a surrogate pair.

    Raises:
        InputError: a byte could not be decoded. The message says where the text came from.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = len(text[: error.start].encode())
        raise not_text(name, start, sys.getfilesystemencoding()) from error
    return text


def not_text(name: str, byte: int, encoding: str) -> InputError:
    """The error for input that is not text in the expected encoding."""
    return InputError(
        f"{name}: byte {byte:,} is not {encoding.upper()}; convert the text, for example with "
        "iconv -f latin1 -t utf-8"
    )


class LastingOutput:
    """An output stream for long jobs. Once its reader or terminal is gone, it drops all text."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text. Characters that the stream's encoding lacks become escapes."""
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # `prepare` was not called, as from Python
            encoding = self.stream.encoding or "ascii"
            known = text.encode(encoding, "backslashreplace").decode(encoding)
            return self.stream.write(known)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Redirect the stream, with the text that it still buffers, to the null device."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
