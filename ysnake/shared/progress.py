"""How far long work is: a bar in a terminal or a notebook, a line every half minute in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LOG_EVERY = 30.0  # seconds between two lines in a log

Show = Callable[[float | None, str], None]


@contextmanager
def progress(console: "Console") -> Iterator[Show]:
    """Show progress while the block runs.

    Yields a function that updates what is shown. It takes the part of the work that is done, from 0
    to 1 or None where nobody knows, and a text without markup.
    """
    if console.quiet:
        yield lambda done, text: None
    elif console.is_terminal:
        with _terminal_bar(console) as show:
            yield show
    elif console.is_jupyter:
        with _notebook_bar() as show:
            yield show
    else:
        yield _log(console)


def counted(show: Show, total: int | None, text: str) -> Callable[[int], None]:
    """A function that takes the number of characters just read, and shows the part of `total`."""
    done = 0

    def advance(characters: int) -> None:
        nonlocal done
        done += characters
        part = None if total is None else min(1.0, done / max(1, total))
        share = "" if part is None else f"{part:.0%}, "
        show(part, f"{text}: {share}{done / 1e6:,.1f} million characters")

    return advance


def announce(console: "Console", show: Show, text: str) -> None:
    """Show long work that cannot say how far it is. A log gets the text at once."""
    if console.is_terminal or console.is_jupyter:
        show(None, text)
    else:
        console.print(text, markup=False)


@contextmanager
def _terminal_bar(console: "Console") -> Iterator[Show]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task("", total=1.0)
        (task,) = bar.tasks

        def show(done: float | None, text: str) -> None:
            task.total = None if done is None else 1.0  # `update` leaves a total for None
            bar.update(task.id, completed=done or 0.0, description=text)

        yield show


@contextmanager
def _notebook_bar() -> Iterator[Show]:
    """A bar in HTML. That of rich needs ipywidgets, which not every notebook has."""
    from IPython.display import HTML, display  # it runs the notebook, so it is there

    handle = display(HTML(""), display_id=True)
    left = _TimeLeft()
    shown, measured = 0.0, True

    def show(done: float | None, text: str) -> None:
        nonlocal shown, measured
        rest = left(done)
        same = measured == (done is not None)
        if same and time.monotonic() - shown < 0.2:  # seconds; a notebook draws slowly
            return
        shown, measured = time.monotonic(), done is not None
        value = "" if done is None else f' value="{done:.4f}"'
        bar = f'<progress max="1"{value}></progress>'
        handle.update(HTML(f"{bar} {escape(text + rest)}"))

    try:
        yield show
    finally:
        handle.update(HTML(""))


def _log(console: "Console") -> Show:
    left, written = _TimeLeft(), time.monotonic()

    def show(done: float | None, text: str) -> None:
        nonlocal written
        rest = left(done)
        if time.monotonic() - written >= LOG_EVERY:
            written = time.monotonic()
            console.print(text + rest, markup=False)

    return show


class _TimeLeft:
    """Says how long the rest will take, if it goes on as fast as since the first call."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # time and part that was done

    def __call__(self, done: float | None) -> str:
        if done is None:
            return ""
        now = time.monotonic()
        self.first = self.first or (now, done)
        seconds, gained = now - self.first[0], done - self.first[1]
        if gained <= 0:
            return ""
        return f", {duration(seconds * (1 - done) / gained)} left"


def duration(seconds: float) -> str:
    """A time in words that are easy to read, such as "40 s", "12 min" or "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
