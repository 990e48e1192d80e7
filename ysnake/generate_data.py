"""`python -m ysnake.generate_data`: let a language model in Ollama write a corpus.

It is asked about English words, encyclopedia topics and days of the year, by prompts of our own.
Each document is written the moment it is finished, whole or not at all, and a ledger beside the
file remembers what was asked, so that a process stopped or killed is taken up where it was.
"""

import asyncio
import json
import os
import random
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from tyro.conf import arg

from ysnake.data_generation import ollama_client
from ysnake.data_generation.ollama_client import ServerError
from ysnake.shared import cli
from ysnake.shared.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

LISTS = Path(__file__).parent / "data_generation" / "lists"
KINDS = ("words", "topics", "dates")
KEPT = "kept"
DROPPED = ("refusal", "stub", "duplicate", "near duplicate")
SYSTEM = (
    "You write short documents of plain English prose. Answer with the document alone: no title, "
    "no headings, no lists, no markdown, no remark before or after it, and do not speak of "
    "yourself or to the reader. Divide it into one to three paragraphs with an empty line between "
    "them. State as fact only what you are sure of, and rather leave a name or a year out than "
    "guess it. Do not begin as such texts usually begin."
)


@dataclass
class Options:
    """Let a language model in Ollama write a corpus: on words, encyclopedia topics and days of the
    year. Stopped or killed, the same command goes on where it was. The server is the one that the
    environment variable OLLAMA_HOST names, by default 127.0.0.1:11434."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("corpus")
    """Folder of the corpus: words.txt, topics.txt and dates.txt."""
    kinds: tuple[Literal["words", "topics", "dates"], ...] = KINDS
    """What the documents are about."""
    count: int | None = None
    """Documents of each kind; by default one on each word, topic and day. More than that ask again
    from another angle."""
    model: Annotated[str, arg(metavar="NAME")] = "llama3.1"
    """Who writes: the name of a model in Ollama."""
    pull: bool = False
    """Have Ollama download the model if it is not there. On a terminal you are asked."""
    parallel: int = 4
    """Requests at a time."""
    seed: int = 0
    """Decides what is asked, in which order and from which angle."""
    temperature: float = 0.8
    """How freely the model writes."""
    max_tokens: int = 2048
    """Where an answer is cut, back to its last sentence. A model that thinks first needs many."""
    min_words: int = 40
    """A shorter document is a stub, and dropped."""
    retries: int = 6
    """How often a request that failed is tried again: after 0.5 seconds, 1, 2, 4, ..."""


@dataclass(frozen=True)
class Task:
    """One document to ask for: the number `prompt` of the kind's prompts, about `entry`."""

    entry: str
    prompt: int


def lines(name: str) -> list[str]:
    """The lines of a file of the package's lists."""
    return (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def tasks(kind: str, seed: int) -> Iterator[Task]:
    """All that can be asked of a kind: each entry once, then each again by its next prompt."""
    entries, prompts = lines(kind), len(lines(f"{kind}_prompts"))
    chance = random.Random(f"{seed} {kind}")
    chance.shuffle(entries)
    first = [chance.randrange(prompts) for _ in entries]
    for turn in range(prompts):
        for entry, start in zip(entries, first, strict=True):
            yield Task(entry, (start + turn) % prompts)


class Shelf:
    """The documents of one kind on disk, and what is still to be asked.

    The ledger holds a line for each answer: what was asked, what became of it and, if it was kept,
    where its document lies in the file. That line is written before the document; so a document
    that a kill has torn is known by the last line, and both are cut off.

    Raises:
        InputError: the file is not as its ledger says, or another process is writing it.
    """

    def __init__(self, folder: Path, kind: str, count: int | None, seed: int) -> None:
        from ysnake.text.data import read_file
        from ysnake.text.prose import Seen

        self.kind, self.path = kind, folder / f"{kind}.txt"
        # hidden, so that training does not take it for data
        self.ledger = (folder / f".{kind}.jsonl").open("ab+", buffering=0)
        lock(self.ledger, self.path)
        self.file = self.path.open("ab", buffering=0)
        records = recover(self.file, self.ledger, self.path)
        self.counts = Counter(record["verdict"] for record in records)
        self.words = 0
        self.seen = Seen()
        for text, _ in read_file(self.path):
            self.seen.add(text)
            self.words += len(text.split())
        done = {Task(record["entry"], record["prompt"]) for record in records}
        self.count = count or len(lines(kind))
        self.tasks = (task for task in tasks(kind, seed) if task not in done)
        self.prompts = lines(f"{kind}_prompts")
        self.asked = 0  # answers that are being waited for
        self.thinks = False  # whether answers begin inside a thought, as some models' do

    @property
    def wants(self) -> bool:
        """Whether more must be asked for, if all that is asked for now is kept."""
        return self.counts[KEPT] + self.asked < self.count

    @property
    def filled(self) -> float:
        """How far it is, counting what is asked for."""
        return (self.counts[KEPT] + self.asked) / self.count

    def close(self) -> None:
        """Let go of the files."""
        self.file.close()
        self.ledger.close()

    def put(self, task: Task, answer: str, cut: bool, min_words: int) -> None:
        """Keep or drop the answer to a task; `cut` says that it is longer than the limit."""
        from ysnake.text import prose, thoughts
        from ysnake.text.tokenizer import EOT

        begins_in_thought = thoughts.begins_in_thought(answer)
        self.thinks |= begins_in_thought
        if cut and self.thinks and not begins_in_thought:
            answer = ""  # it was cut before its thought ended
        text = prose.plain(answer)
        text = prose.whole_sentences(text) if cut else text
        if prose.is_refusal(text):
            verdict = "refusal"
        elif len(text.split()) < min_words:
            verdict = "stub"
        else:
            verdict = self.seen.verdict(text) or KEPT
        record: dict[str, Any] = asdict(task) | {"verdict": verdict}
        document = b""
        if verdict == KEPT:
            at = self.file.seek(0, os.SEEK_END)
            document = ((f"{EOT}\n" if at else "") + text + "\n").encode()
            record |= {"at": at, "bytes": len(document)}
        append(self.ledger, (json.dumps(record, ensure_ascii=False) + "\n").encode(), self.path)
        if document:
            append(self.file, document, self.path)
        self.counts[verdict] += 1
        if verdict == KEPT:
            self.seen.add(text)
            self.words += len(text.split())


def open_shelves(options: Options) -> list[Shelf]:
    """The shelves of a corpus folder, which is made if it is not there."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        kinds = dict.fromkeys(options.kinds)
        return [Shelf(options.out, kind, options.count, options.seed) for kind in kinds]
    except OSError as error:
        raise InputError(f"--out: {error.filename}: {error.strerror}") from error


def append(file: BinaryIO, data: bytes, path: Path) -> None:
    """Add bytes to the end of an unbuffered file and wait for the disk; all of them or none.

    Raises:
        InputError: the disk is full or fails.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(end)
        raise InputError(f"{path}: {error.strerror}") from error


def lock(file: BinaryIO, path: Path) -> None:
    """Hold a file for this process alone, until the process ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it") from None


def recover(file: BinaryIO, ledger: BinaryIO, path: Path) -> list[dict[str, Any]]:
    """Cut off what a killed process left half-written; returns the lines of the ledger.

    Raises:
        InputError: the ledger or the file is of another hand. Both stay as they are.
    """
    ledger.seek(0)
    *whole, torn = ledger.read().split(b"\n")
    try:
        records = [json.loads(line) for line in whole]
        ends = document_ends(records)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: what was asked, in {ledger.name}, is damaged") from error
    size, end = file.seek(0, os.SEEK_END), ends[-1]
    if records and records[-1]["verdict"] == KEPT and ends[-2] <= size < end:
        file.truncate(ends[-2])
        ledger.truncate(sum(len(line) + 1 for line in whole[:-1]))
        return records[:-1]
    if size != end:
        raise InputError(
            f"{path}: expected {end} bytes, as last written by this command, got {size}; "
            "to leave it as it is, give another --out"
        )
    if torn:
        ledger.truncate(sum(len(line) + 1 for line in whole))
    return records


def document_ends(records: list[Any]) -> list[int]:
    """Where the file ends before the first answer of a ledger, and after each.

    Raises:
        ValueError, LookupError, TypeError: this command did not write these records.
    """
    ends = [0]
    for record in records:
        entry, prompt, verdict = record["entry"], record["prompt"], record["verdict"]
        if not isinstance(entry, str) or type(prompt) is not int:
            raise TypeError("an entry or a prompt of another kind")
        size = 0
        if verdict == KEPT:
            at, size = record["at"], record["bytes"]
            if type(at) is not int or type(size) is not int or at != ends[-1] or size <= 0:
                raise ValueError("a document that does not follow the one before it")
        elif verdict not in DROPPED:
            raise ValueError("a verdict that is not known")
        ends.append(ends[-1] + size)
    return ends


def next_task(shelves: list[Shelf]) -> tuple[Shelf, Task] | None:
    """What to ask for next: something of the kind that is furthest behind."""
    for shelf in sorted((s for s in shelves if s.wants), key=lambda s: s.filled):
        for task in shelf.tasks:
            return shelf, task
    return None


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


def check(options: Options) -> None:
    """See that the options can work.

    Raises:
        InputError: one cannot, named.
    """
    least = {"count": 1, "parallel": 1, "max_tokens": 1, "min_words": 1}
    least |= {"retries": 0, "temperature": 0}
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and not value >= limit:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {limit}, got {value}")
    if not options.kinds:
        raise InputError(f"--kinds: expected some of {', '.join(KINDS)}")


def main(argv: list[str]) -> int:
    """Write a corpus as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, "generate_data")
    check(options)
    console = cli.console()
    shelves, code = [], cli.DONE
    try:
        ollama_client.prepare(options.model, options.pull, console)
        shelves = open_shelves(options)
        asyncio.run(fill(shelves, options, console))
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = cli.FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        code = cli.INTERRUPTED
    finally:
        for shelf in shelves:
            shelf.close()
    if shelves:
        report(shelves, console)
        if code != cli.DONE:
            console.print("The same command goes on from here.")
        elif any(shelf.wants for shelf in shelves):
            console.print("Everything was asked from every angle; there is no more to ask.")
        if any(shelf.counts[KEPT] for shelf in shelves):
            console.print(f"next: python -m ysnake.train --data {options.out}", markup=False)
    return code


if __name__ == "__main__":
    cli.run(main)
