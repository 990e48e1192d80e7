"""Which implementation of an operator runs, and how a user overrides it.

`eager` runs unless the environment variable YSNAKE_BACKEND or `with backend(name):` asks
for another.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

NAMES = ("reference", "eager")

_override: ContextVar[str | None] = ContextVar("ysnake_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator called inside the `with` block by the implementation `name`.

    Raises ValueError if there is no such implementation. Nests; local to the thread and to the
    asynchronous task; stronger than YSNAKE_BACKEND.
    """
    token = _override.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


def choose() -> str:
    """The name of the implementation to run: the override if there is one, else `eager`."""
    name = _override.get()
    if name is not None:
        return name
    if name := os.environ.get("YSNAKE_BACKEND"):
        return _checked(name, "YSNAKE_BACKEND")
    return "eager"
