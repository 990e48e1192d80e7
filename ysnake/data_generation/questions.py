"""What the language model is asked about words, topics and days of the year, from many angles."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

LISTS = Path(__file__).parent / "lists"
Kind = Literal["words", "topics", "dates"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SYSTEM = (
    "You write short documents of plain English prose. Answer with the document alone: no title, "
    "no headings, no lists, no markdown, no remark before or after it, and do not speak of "
    "yourself or to the reader. Divide it into one to three paragraphs with an empty line between "
    "them. State as fact only what you are sure of, and rather leave a name or a year out than "
    "guess it. Do not begin as such texts usually begin."
)


@dataclass(frozen=True)
class Task:
    """One question: about `entry`, with the prompt number `prompt` of its kind."""

    entry: str
    prompt: int


def lines(name: str) -> list[str]:
    """The lines of a file in lists/."""
    return (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def tasks(kind: str, seed: int) -> Iterator[Task]:
    """All questions of a kind: each entry once, then each again with its next prompt."""
    entries, prompts = lines(kind), len(lines(f"{kind}_prompts"))
    chance = random.Random(f"{seed} {kind}")
    chance.shuffle(entries)
    first = [chance.randrange(prompts) for _ in entries]
    for turn in range(prompts):
        for entry, start in zip(entries, first, strict=True):
            yield Task(entry, (start + turn) % prompts)
