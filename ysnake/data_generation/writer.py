"""Having the language model write documents, several at a time, and showing the progress."""

import asyncio
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ysnake.data_generation import ollama_client
from ysnake.data_generation.document_store import DocumentStore, next_task
from ysnake.data_generation.ledger import DROPPED, KEPT
from ysnake.data_generation.options import Options
from ysnake.data_generation.questions import SYSTEM
from ysnake.shared.shown import amount

if TYPE_CHECKING:
    from rich.console import Console


async def write_corpus(stores: list[DocumentStore], options: Options, console: "Console") -> None:
    """Ask for documents, several at a time, until all stores are full or no question is left.

    Raises:
        ServerError, InputError: see `ollama_client.with_retries` and `DocumentStore.add`.
        asyncio.CancelledError: the user pressed Ctrl-C.
    """
    from ollama import AsyncClient

    print_line = partial(console.print, markup=False)

    async def work(client: AsyncClient) -> None:
        while found := next_task(stores):
            store, task = found
            store.asked += 1
            prompt = store.prompts[task.prompt].format(task.entry)
            settings = {
                "temperature": options.temperature,
                "seed": zlib.crc32(f"{options.seed} {task.entry} {task.prompt}".encode()) >> 1,
                "num_predict": options.max_tokens,
            }
            ask = partial(ollama_client.ask, client, options.model, prompt, SYSTEM, settings)
            answer, cut = await ollama_client.with_retries(
                ask, options.model, options.retries, print_line
            )
            store.asked -= 1
            store.add(task, answer, cut, options.min_words)
            show()

    most = options.max_tokens * ollama_client.TOKEN_BYTES + ollama_client.LARGEST_REPLY // 64
    with progress(stores, console) as show, cancelled_by_ctrl_c():
        async with ollama_client.connect(AsyncClient, most) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(options.parallel)]
            try:
                await asyncio.gather(*workers)
            finally:  # if one fails, end the others
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)


@contextmanager
def cancelled_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C cancel the running task where it waits, never in the middle of a write."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # this is called within one
    before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(stores: list[DocumentStore], console: "Console") -> Iterator[Callable[[], None]]:
    """Show a bar with documents, words, dropped answers and time left. Yields its update."""
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
    shown = bar.add_task("", total=sum(s.count for s in stores), words=0, dropped=0)

    def show() -> None:
        kept = sum(s.counts[KEPT] for s in stores)
        dropped = sum(s.counts.total() for s in stores) - kept
        words = sum(s.words for s in stores)
        bar.update(shown, completed=kept, words=words, dropped=dropped)

    with bar:
        show()
        yield show


def report(stores: list[DocumentStore], console: "Console") -> None:
    """Print how many documents there are, and how many answers were dropped."""
    for store in stores:
        console.print(
            f"{store.path}: {store.counts[KEPT]:,} of {amount(store.count, 'document')}, "
            f"{amount(store.words, 'word')}",
            markup=False,
        )
    total = sum((store.counts for store in stores), Counter())
    console.print("dropped: " + ", ".join(f"{total[k]} as {k}" for k in DROPPED))
