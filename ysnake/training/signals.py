"""Signals that ask training to stop: Ctrl-C, a closed terminal, a request to terminate."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

# SIGHUP: the terminal was closed. Windows has no SIGHUP; only Windows has SIGBREAK.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
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


class Stop:
    """Remembers whether a signal has asked training to stop. A second Ctrl-C interrupts at once."""

    requested = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        def request(number: int, _frame: object) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True

        with _handling(request):
            yield self
