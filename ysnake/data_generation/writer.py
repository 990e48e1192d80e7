"""The work of `python -m ysnake.generate_data`: ask, several at a time, and show how far it is."""

import asyncio
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ysnake.data_generation import ollama_client
from ysnake.data_generation.ledger import DROPPED, KEPT
from ysnake.data_generation.options import Options
from ysnake.data_generation.questions import SYSTEM
from ysnake.data_generation.shelf import Shelf, next_task

if TYPE_CHECKING:
    from rich.console import Console


async def fill(shelves: list[Shelf], options: Options, console: "Console") -> None:
    """Ask for documents, several at a time, until all shelves are full or nothing is left to ask.

    Raises:
        ServerError, InputError: as `ollama_client.patiently` and `Shelf.put`.
        asyncio.CancelledError: Ctrl-C was pressed.
    """
    from ollama import AsyncClient

    tell = partial(console.print, markup=False)

    async def work(client: AsyncClient) -> None:
        while found := next_task(shelves):
            shelf, task = found
            shelf.asked += 1
            prompt = shelf.prompts[task.prompt].format(task.entry)
            settings = {
                "temperature": options.temperature,
                "seed": zlib.crc32(f"{options.seed} {task.entry} {task.prompt}".encode()) >> 1,
                "num_predict": options.max_tokens,
            }
            ask = partial(ollama_client.ask, client, options.model, prompt, SYSTEM, settings)
            answer, cut = await ollama_client.patiently(ask, options.model, options.retries, tell)
            shelf.asked -= 1
            shelf.put(task, answer, cut, options.min_words)
            show()

    most = options.max_tokens * ollama_client.TOKEN_BYTES + ollama_client.LARGEST_REPLY // 64
    with progress(shelves, console) as show, cancelled_by_ctrl_c():
        async with ollama_client.connect(AsyncClient, most) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(options.parallel)]
            try:
                await asyncio.gather(*workers)
            finally:  # if one fails, the others end with it
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)


@contextmanager
def cancelled_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C cancels the running task where it waits, never in the middle of a write."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(shelves: list[Shelf], console: "Console") -> Iterator[Callable[[], None]]:
    """A bar with documents, words, what was dropped and the time left; yields what moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    texts = ("documents", "{task.fields[words]:,} words", "{task.fields[dropped]} dropped")
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, texts),
        TimeLeft(),
        console=console,
        transient=True,
        speed_estimate_period=600,  # seconds; a document may take many
        disable=not console.is_terminal,
    )
    shown = bar.add_task("", total=sum(s.count for s in shelves), words=0, dropped=0)

    def show() -> None:
        kept = sum(s.counts[KEPT] for s in shelves)
        dropped = sum(s.counts.total() for s in shelves) - kept
        words = sum(s.words for s in shelves)
        bar.update(shown, completed=kept, words=words, dropped=dropped)

    with bar:
        show()
        yield show


def report(shelves: list[Shelf], console: "Console") -> None:
    """Say what there is, and what was dropped."""
    for shelf in shelves:
        console.print(
            f"{shelf.path}: {shelf.counts[KEPT]:,} of {shelf.count:,} documents, "
            f"{shelf.words:,} words",
            markup=False,
        )
    total = sum((shelf.counts for shelf in shelves), Counter())
    console.print("dropped: " + ", ".join(f"{total[k]} as {k}" for k in DROPPED))
