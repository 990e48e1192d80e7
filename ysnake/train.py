"""`python -m ysnake.train`: train a model on documents, watch it learn, stop and resume at will.

The options are in `ysnake.training.settings`, the work in the other modules of `ysnake.training`:
`open_run` makes or reads a run, `loop` trains it, `step` is one step.
"""

from ysnake.shared import cli
from ysnake.shared.waiting import sleep_soon
from ysnake.training import launch, parallel, sharing
from ysnake.training import settings as settings_of
from ysnake.training.loop import fit
from ysnake.training.new_run import plan
from ysnake.training.open_run import open_run
from ysnake.training.parallel import Ranks
from ysnake.training.settings import Settings
from ysnake.training.signals import Stop
from ysnake.training.stopping import reason_to_end, summary


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Train as the command line says; returns the exit code."""
    sleep_soon()
    with launch.printed_once():
        settings = settings_of.parse(launch.resumed_after_restart(argv), program)
        sharing.check(settings)
        if settings.plan:
            console = cli.console()
            console.print(plan(settings, console))
            return cli.DONE
        cli.use_threads(settings.threads)
    with parallel.process_group(
        settings.device, settings.context_parallel, settings.shard
    ) as ranks:
        return _train(settings, ranks, program)


def _train(settings: Settings, ranks: Ranks, program: str) -> int:
    console = cli.console()
    console.quiet = not ranks.first
    stop = Stop()
    with open_run(settings, ranks, console) as run, stop.listening():
        if settings.resume:
            run.progress.ended = run.progress.ended and reason_to_end(run)
        fit(run, stop, console)
    progress = run.progress
    console.print(summary(run, program))
    return {"interrupted": cli.INTERRUPTED, "diverged": cli.FAILED}.get(
        progress.ended or "", cli.DONE
    )


if __name__ == "__main__":
    cli.run(main)
