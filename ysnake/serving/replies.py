"""What both APIs give to the application: a job to do, and the shape of its reply."""

from collections.abc import Callable
from dataclasses import dataclass

from ysnake.inference.batch import Job
from ysnake.serving.fields import Body


@dataclass
class Asked:
    """What a request asks for, and how its API writes the reply."""

    job: Job | None  # None: there is nothing to write
    piece: Callable[[str], Body]  # some text of a stream
    ends: Callable[[], list[Body]]  # what ends a stream
    whole: Callable[[str], Body]  # all in one
