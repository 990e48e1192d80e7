"""Why a training run ends, how it is asked to stop, and what is said at its end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ysnake.training_run import Run

MEAN_OVER = 50  # steps that the training loss is averaged over where it decides or is shown
GIVE_UP_AFTER = 10  # steps in a row without a finite loss
ENDINGS = {
    "steps": "all {step} steps are done",
    "time": "the time is up",
    "loss": "the training loss is down to {loss:.3f}",
    "patience": "the held-out loss has stopped getting better",
    "interrupted": "interrupted; --resume goes on from here",
    "diverged": "loss or gradient were not finite ten times in a row, so the run was stopped; "
    "a lower --lr or a longer --warmup-steps helps most often",
}


class Stop:
    """Whether Ctrl-C or SIGTERM has asked the run to stop; a second Ctrl-C stops at once."""

    requested = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        def request(number: int, _frame: object) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True

        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, request) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def reason_to_end(run: Run) -> str | None:
    """Why the run should end now, if it should."""
    settings, progress = run.settings, run.progress
    if progress.skipped_in_a_row >= GIVE_UP_AFTER:
        return "diverged"
    target = settings.stop_at_loss
    if target is not None and len(progress.recent) == MEAN_OVER and progress.mean_loss <= target:
        return "loss"
    if settings.max_steps is not None and progress.step >= settings.max_steps:
        return "steps"
    if settings.max_minutes is not None and progress.elapsed >= 60 * settings.max_minutes:
        return "time"
    if settings.patience is not None and progress.evaluations_since_best >= settings.patience:
        return "patience"
    return None
