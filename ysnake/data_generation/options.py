"""The options of `python -m ysnake.generate_data`, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ysnake.data_generation.questions import KINDS, Kind
from ysnake.shared.errors import InputError


@dataclass
class Options:
    """Let a language model in Ollama write a corpus: on words, encyclopedia topics and days of the
    year. If it is stopped or killed, the same command continues. The environment variable
    OLLAMA_HOST names the server, by default 127.0.0.1:11434."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("corpus")
    """Folder of the corpus: words.txt, topics.txt and dates.txt."""
    kinds: tuple[Kind, ...] = KINDS
    """What the documents are about."""
    count: int | None = None
    """Documents of each kind; by default one on each word, topic and day. A larger number asks
    about them again, with other questions."""
    model: Annotated[str, arg(metavar="NAME")] = "llama3.1"
    """The model that writes, by its name in Ollama."""
    pull: bool = False
    """Let Ollama download the model if it is missing. Without this option you are asked, if the
    command runs in a terminal."""
    parallel: int = 4
    """Requests at a time."""
    seed: int = 0
    """Determines the order and the wording of the questions."""
    temperature: float = 0.8
    """Sampling temperature of the model."""
    max_tokens: int = 2048
    """Token limit of an answer. A longer one is cut after its last complete sentence. Reasoning
    models need a high limit."""
    min_words: int = 40
    """A document with fewer words is dropped as a stub."""
    retries: int = 6
    """How often a failed request is repeated: after 0.5 seconds, 1, 2, 4, ..."""


def check(options: Options) -> None:
    """Check the options.

    Raises:
        InputError: a value is impossible. `InputError.field` names the option.
    """
    least = {"count": 1, "parallel": 1, "max_tokens": 1, "min_words": 1}
    least |= {"retries": 0, "temperature": 0}
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and not value >= limit:
            raise InputError(
                f"expected at least {limit}, got {value}", field=f"--{name.replace('_', '-')}"
            )
    if not options.kinds:
        raise InputError(f"expected some of {', '.join(KINDS)}", field="--kinds")
