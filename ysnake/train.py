"""`python -m ysnake.train`: train a model on documents, watch it learn, stop and resume at will.

The options are in `ysnake.training.options`, the work is in `ysnake.training.session`. This module
can also be called, so `ysnake.train(...)` trains from Python.
"""

import inspect
import sys
from types import ModuleType

from ysnake.shared import cli
from ysnake.shared.waiting import sleep_soon
from ysnake.trained_run import train
from ysnake.training import launch, session, sharing
from ysnake.training import settings as settings_of
from ysnake.training.new_run import plan


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Train as the command line says; returns the exit code."""
    sleep_soon()
    with launch.printed_once():
        settings = settings_of.parse(launch.resumed_after_restart(argv), program)
        sharing.check(settings)
        console = cli.console()
        cli.use_threads(settings.threads)
        if settings.plan:
            console.print(plan(settings, console))
            return cli.DONE
    ended = session.train(settings, cli.console(), program).ended
    return {"interrupted": cli.INTERRUPTED, "diverged": cli.FAILED}.get(ended or "", cli.DONE)


class CallableModule(ModuleType):
    """A module that trains when it is called.

    `ysnake.train` is a module because `python -m ysnake.train` needs one. Python allows to change
    the class of a module, and a class can define what a call does.
    """

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = CallableModule
__signature__ = inspect.signature(train)  # what notebooks show of the call

if __name__ == "__main__":
    cli.run(main)
