"""The documents of one kind on disk, and the questions that are still to be asked."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ysnake.data_generation.ledger import KEPT, REFUSAL, STUB, append, lock, recover
from ysnake.data_generation.options import Options
from ysnake.data_generation.questions import Task, lines, tasks
from ysnake.shared.errors import InputError, why


class DocumentStore:
    """The documents of one kind on disk, and the questions that are still to be asked.

    The ledger has a line for each answer: the question, whether the answer was kept and, if so,
    where its document is in the file. After a kill the last document may be incomplete. Then it is
    cut off, together with its line.

    Raises:
        InputError: the file does not match its ledger, or another process is writing it.
    """

    def __init__(self, folder: Path, kind: str, count: int | None, seed: int) -> None:
        from ysnake.text.data import read_file
        from ysnake.text.prose import Seen

        self.kind, self.path = kind, folder / f"{kind}.txt"
        # hidden, so that training does not read it as data
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
        self.asked = 0  # questions without an answer yet
        # whether an answer closed a thought that it had not opened
        self.thinks = any(record.get("thought") for record in records)

    @property
    def needs_more(self) -> bool:
        """Whether there would be too few documents even if every open question gave one."""
        return self.counts[KEPT] + self.asked < self.count

    @property
    def share_done(self) -> float:
        """Documents and open questions as a share of the documents that are wanted."""
        return (self.counts[KEPT] + self.asked) / self.count

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        self.ledger.close()

    def add(self, task: Task, answer: str, cut: bool, min_words: int) -> None:
        """Keep or drop the answer to a task. `cut`: it was cut at the token limit."""
        from ysnake.text import prose, thoughts
        from ysnake.text.tokenizer import EOT

        begins_in_thought = thoughts.begins_in_thought(answer)
        self.thinks |= begins_in_thought
        if cut and self.thinks and not begins_in_thought:
            answer = ""  # it was cut before its thought ended
        text = prose.plain(answer, cut)
        if prose.is_refusal(text):
            verdict = REFUSAL
        elif len(text.split()) < min_words:
            verdict = STUB
        else:
            verdict = self.seen.verdict(text) or KEPT
        record: dict[str, Any] = asdict(task) | {"verdict": verdict, "thought": begins_in_thought}
        document = b""
        at = self.file.seek(0, os.SEEK_END)
        if verdict == KEPT:
            document = ((f"{EOT}\n" if at else "") + text + "\n").encode()
            record |= {"at": at, "bytes": len(document)}
        before = self.ledger.seek(0, os.SEEK_END)
        line = json.dumps(record, ensure_ascii=False).encode()
        try:
            append(self.ledger, line, self.path)
            append(self.file, document, self.path)
            append(self.ledger, b"\n", self.path)
        except InputError:
            self.file.truncate(at)  # other answers may still be added
            self.ledger.truncate(before)
            raise
        self.counts[verdict] += 1
        if verdict == KEPT:
            self.seen.add(text)
            self.words += len(text.split())


def open_stores(options: Options) -> list[DocumentStore]:
    """Open the stores of a corpus folder. The folder is created if it does not exist."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        kinds = dict.fromkeys(options.kinds)
        return [DocumentStore(options.out, kind, options.count, options.seed) for kind in kinds]
    except OSError as error:
        raise InputError(f"{error.filename}: {why(error)}", field="--out") from error


def next_task(stores: list[DocumentStore]) -> tuple[DocumentStore, Task] | None:
    """The next task, of the kind that is furthest behind."""
    for store in sorted((s for s in stores if s.needs_more), key=lambda s: s.share_done):
        for task in store.tasks:
            return store, task
    return None
