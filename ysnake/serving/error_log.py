"""The server's log of errors: on stderr, of a bounded size, without control characters."""

import logging
import time
from collections import Counter

PERIOD = 3600.0  # seconds
MOST = 50  # warnings, and as many errors, in each period
LONGEST = 10_000  # characters of a record


class _Bound(logging.Filter):
    """Lets through the first `MOST` records of each period and says which is the last.

    Warnings and errors count apart: a client who sends many bad requests hides no error of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.since, self.counts = time.monotonic(), Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() - self.since >= PERIOD:
            self.since, self.counts = time.monotonic(), Counter()
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        self.counts[kind] += 1
        if self.counts[kind] == MOST:
            record.msg = f"{record.getMessage()} (no more {kind} is logged within this hour)"
            record.args = ()
        return self.counts[kind] <= MOST


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from ysnake.shared.shown import escape_controls

        return escape_controls(super().format(record), keep="\n\t")[:LONGEST]


def install() -> None:
    """Send the warnings and errors of all libraries to this log."""
    handler = logging.StreamHandler()
    handler.addFilter(_Bound())
    handler.setFormatter(_Shown("%(asctime)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
