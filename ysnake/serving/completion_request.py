"""A request for a completion, as both APIs hand it to the application."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ysnake.inference.batch import Job
from ysnake.serving.fields import Body


@dataclass
class CompletionRequest:
    """What a client asks for, and how the API shapes the reply."""

    job: Job | None  # None: there is nothing to write
    part: Callable[[str], Body]  # a part of a stream, with new text
    last_parts: Callable[[], list[Body]]  # the parts that end a stream
    whole: Callable[[str], Body]  # the reply without a stream, with all the text
    first_parts: list[Body] = field(default_factory=list)  # the parts that begin a stream
    strip_start: bool = False  # leave out spaces at the start of the text
