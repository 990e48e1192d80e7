"""The loop of training: step after step until there is a reason to end."""

import json
import os
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ysnake.shared import cli
from ysnake.shared.progress import progress as shown_progress
from ysnake.training import metrics as metrics_of
from ysnake.training.evaluation import evaluate
from ysnake.training.plot import draw_loss
from ysnake.training.run import MEAN_OVER, Run, keep_good, save_last
from ysnake.training.signals import Stop
from ysnake.training.step import prepare, train_step
from ysnake.training.stopping import reason_to_end
from ysnake.training.tool_log import tool_log

if TYPE_CHECKING:
    from rich.console import Console

DRAWING_SHARE = 0.05  # of the time of training, at most, is spent on drawing the losses


def fit(run: Run, stop: Stop, console: "Console") -> None:
    """Train until there is a reason to end, and complete last/, the metrics and the picture."""
    settings, progress = run.settings, run.progress
    times: deque[float] = deque(maxlen=MEAN_OVER)  # of the last steps, in seconds
    n_tokens = settings.accumulate * settings.batch_size * settings.seq_len
    path = run.folder / "metrics.jsonl" if run.ranks.first else Path(os.devnull)
    prepare(run)
    with (
        cli.file_errors(path),
        path.open("a", buffering=1) as metrics,
        shown_progress(console) as show,
        tool_log(run, console) as log,
    ):

        def sync() -> None:
            if run.ranks.first:
                os.fsync(metrics.fileno())

        def count(began: float) -> float:
            """Add the seconds since then, on the first rank, to those of training; returns them."""
            seconds = run.ranks.from_first(max(0.0, time.perf_counter() - began))
            progress.elapsed += seconds
            return seconds

        resumed, drawn, draw_after = settings.resume, False, 0.0
        show(metrics_of.part_done(run), "starting")
        while progress.ended is None:
            began = time.perf_counter()
            measured = train_step(run, stop)
            if measured is None:
                progress.ended = "interrupted"
                break
            seconds = count(began)
            times.append(seconds)
            progress.ended = reason_to_end(run)
            said = metrics_of.text(run, _per_second(n_tokens * len(times), sum(times)) or 0.0)
            done = metrics_of.part_done(run)
            show(done, said)
            evaluated = progress.step % settings.eval_every == 0 or progress.ended is not None
            if evaluated:
                began = time.perf_counter()
                measured |= evaluate(run, console, partial(show, done))
                count(began)
                progress.ended = progress.ended or reason_to_end(run)
            line = metrics_of.line(run, measured, _per_second(n_tokens, seconds), resumed)
            metrics.write(json.dumps(line) + "\n")
            log(line)
            resumed = False
            ended = progress.ended is not None
            drawn = evaluated and (ended or progress.elapsed >= draw_after)
            if drawn:
                began = time.perf_counter()
                if run.ranks.first:
                    show(done, "drawing the losses")
                    draw_loss(run.folder, console)
                draw_after = count(began) / DRAWING_SHARE + progress.elapsed
            good = not ended and not progress.skipped_in_a_row
            if progress.step % settings.checkpoint_every == 0 and good:
                began = time.perf_counter()
                sync()
                save_last(run)
                count(began)
        sync()
    if progress.ended == "diverged":
        run.ranks.on_first(lambda: keep_good(run))
    else:
        save_last(run)
    if not drawn:  # else the picture shows all steps already
        run.ranks.on_first(lambda: draw_loss(run.folder, console))


def _per_second(number: int, seconds: float) -> float | None:
    """The number for each second; None if the clock has not moved, as a coarse one may."""
    return number / seconds if seconds else None
