"""The error log of the server: on stderr, limited in size, without control characters."""

import logging
import time
from collections import Counter

PERIOD = 3600.0  # seconds
MOST = 50  # warnings, and as many errors, in each period
LONGEST = 10_000  # characters of a record


class _Bound(logging.Filter):
    """Passes the first `MOST` records of each period. The last one says that it is the last.

    Warnings and errors are counted separately, so a client's bad requests cannot hide an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.since, self.counts = time.monotonic(), Counter[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() - self.since >= PERIOD:
            self.since, self.counts = time.monotonic(), Counter[str]()
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        self.counts[kind] += 1
        if self.counts[kind] == MOST:
            record.msg = f"{record.getMessage()} (no more {kind}s are logged within this hour)"
            record.args = ()
        return self.counts[kind] <= MOST


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from ysnake.shared.shown import escape_controls

        return escape_controls(super().format(record), keep="\n\t")[:LONGEST]


def install() -> None:
    """Log the warnings and errors of all libraries here."""
    handler = logging.StreamHandler()
    handler.addFilter(_Bound())
    handler.setFormatter(_Shown("%(asctime)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
