"""A whole training session: make or read a run, train it, and say how it ended."""

from typing import TYPE_CHECKING

from ysnake.shared import cli
from ysnake.training import parallel, tool_log
from ysnake.training.loop import fit
from ysnake.training.open_run import open_run
from ysnake.training.options import Settings
from ysnake.training.precision import products_as
from ysnake.training.run import Progress
from ysnake.training.signals import Stop
from ysnake.training.step import warm_up_warning
from ysnake.training.stopping import reason_to_end, summary

if TYPE_CHECKING:
    from rich.console import Console


def train(settings: Settings, console: "Console", program: str = cli.MODULES) -> Progress:
    """Train until there is a reason to end, which is in the result. `settings.run` is set.

    Args:
        settings: checked settings.
        console: where progress and the summary are printed, by the first of many processes.
        program: how the user starts commands, for the summary.
    """
    with parallel.process_group(
        settings.device, settings.context_parallel, settings.shard
    ) as ranks:
        console.quiet = console.quiet or not ranks.first
        stop = Stop(console.quiet)
        ranks.on_first(lambda: tool_log.check(settings))
        with open_run(settings, ranks, console) as run, stop.listening():
            if settings.resume:
                run.progress.ended = run.progress.ended and reason_to_end(run)
            if line := warm_up_warning(settings):
                console.print(line)
            with products_as(settings.precision, run.device, console):
                fit(run, stop, console)
        console.print(summary(run, program))
        return run.progress
