"""The documents of one kind on disk, and what is still to be asked."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ysnake.data_generation.ledger import KEPT, append, lock, recover
from ysnake.data_generation.options import Options
from ysnake.data_generation.questions import Task, lines, tasks
from ysnake.shared.errors import InputError


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


def next_task(shelves: list[Shelf]) -> tuple[Shelf, Task] | None:
    """What to ask for next: something of the kind that is furthest behind."""
    for shelf in sorted((s for s in shelves if s.wants), key=lambda s: s.filled):
        for task in shelf.tasks:
            return shelf, task
    return None
