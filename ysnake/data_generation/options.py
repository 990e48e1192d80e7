"""The options of `python -m ysnake.generate_data`, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ysnake.data_generation.questions import KINDS
from ysnake.shared.errors import InputError


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
