"""Opening a run to train it: a new or a stored one, locked against other processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ysnake.shared import cli, run_lock
from ysnake.training import run_folder
from ysnake.training.new_run import start
from ysnake.training.options import Settings
from ysnake.training.parallel import Ranks
from ysnake.training.resume import resume
from ysnake.training.run import Run

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def open_run(settings: Settings, ranks: Ranks, console: "Console") -> Iterator[Run]:
    """Start or resume the run of the settings, on every rank.

    While the block runs, no other process can train the run.
    """
    run = None
    if not settings.resume:
        run = ranks.on_first(lambda: start(settings, console))
        settings.run = ranks.from_first(settings.run)
        settings.precision = ranks.from_first(settings.precision)
        if ranks.size > 1:
            run = None  # every rank reads its own from the folder, the first rank too
    busy = f"{settings.folder}: another process is training this run"
    with ExitStack() as held:

        def take_lock() -> None:
            with cli.file_errors(settings.folder):
                held.enter_context(
                    run_lock.lock(settings.folder / run_lock.TRAINING, busy, run_lock.LOOK)
                )
                run_folder.remove_leftovers(settings.folder.parent)

        ranks.on_first(take_lock)
        yield run or resume(settings, ranks, console)
