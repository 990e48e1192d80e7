"""Opening a run to train it: a new one, or one on disk, locked against other processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ysnake.shared import cli, run_lock
from ysnake.training.new_run import start
from ysnake.training.parallel import Ranks
from ysnake.training.resume import resume
from ysnake.training.run import Run
from ysnake.training.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def open_run(settings: Settings, ranks: Ranks, console: "Console") -> Iterator[Run]:
    """The run that the settings mean, on every rank: a new one, or one to go on with.

    No other process trains it as long as the block runs.
    """
    run = None
    if not settings.resume:
        run = ranks.alone(lambda: start(settings, console))
        settings.run = ranks.as_first(settings.run)
    busy = f"{settings.run}: another process is training this run"
    with ExitStack() as held:

        def own() -> None:
            with cli.writing(settings.run):
                held.enter_context(run_lock.lock(settings.run / run_lock.TRAINING, busy))

        ranks.alone(own)
        yield run if run and ranks.size == 1 else resume(settings, ranks, console)
