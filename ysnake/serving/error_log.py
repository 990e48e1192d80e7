"""The server's log of errors: on stderr, of a bounded size, without control characters."""

import logging
import time

PERIOD = 3600.0  # seconds
MOST = 50  # records in each period
LONGEST = 10_000  # characters of a record


class _Bound(logging.Filter):
    """Lets through the first `MOST` records of each period and says which is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.since, self.count = time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() - self.since >= PERIOD:
            self.since, self.count = time.monotonic(), 0
        self.count += 1
        if self.count == MOST:
            record.msg = f"{record.getMessage()} (no more is logged within this hour)"
            record.args = ()
        return self.count <= MOST


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
