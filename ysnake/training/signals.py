"""Signals that ask training to stop: Ctrl-C, a closed terminal, a request to terminate."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

# SIGHUP: the terminal was closed. Windows has no SIGHUP; only Windows has SIGBREAK.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
STOPPING = (
    "stopping after this batch or evaluation, then saving; a second Ctrl-C ends without saving"
)
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle the signals that ask a process to stop by `handler`, while the block runs.

    Python allows this in the main thread only. In another thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before.get(getattr(signal, "SIGHUP", None)) is signal.SIG_IGN:  # started with nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def stop_at_once() -> AbstractContextManager[None]:
    """While the block runs, every such signal raises KeyboardInterrupt, so it can clean up."""
    return _handling(_interrupt)


def _say(line: str) -> None:
    """Write a line to standard error. A signal may come while `print` runs, so this is not print.

    Nobody may read it any more: the terminal may be closed.
    """
    with suppress(OSError, ValueError, AttributeError):  # closed, without a file, or no stderr
        start = "\n" if os.isatty(sys.stderr.fileno()) else ""  # leave the line of the bar
        os.write(sys.stderr.fileno(), f"{start}{line}\n".encode())


class Stop:
    """Remembers whether a signal has asked training to stop. A second Ctrl-C interrupts at once.

    Args:
        quiet: say nothing when the signal comes.
    """

    def __init__(self, quiet: bool = True) -> None:
        self.requested, self.quiet = False, quiet

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        def request(number: int, _frame: object) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not (self.requested or self.quiet):
                _say(STOPPING)
            self.requested = True

        with _handling(request):
            yield self
