"""What metrics.jsonl says of a step, and the same in a line for the user."""

import math
import time
from typing import Any

from ysnake.training.memory import peak
from ysnake.training.run import Run

# These differ from one execution to the next. All others are the same, bit for bit.
OF_THIS_EXECUTION = ("tokens_per_s", "wall_time", "seconds", "peak_memory", "resumed")


def line(run: Run, measured: dict[str, Any], speed: float | None, resumed: bool) -> dict[str, Any]:
    """The line of a step.

    Args:
        run: the run after the step.
        measured: what the step and an evaluation have measured.
        speed: tokens per second in this step.
        resumed: whether this is the first step after the run was resumed.
    """
    progress = run.progress
    found = {
        "step": progress.step,
        "tokens": progress.tokens,
        "epoch": round(progress.tokens / len(run.train), 4),
        **measured,
        "tokens_per_s": speed,
        "skipped": progress.skipped,
        "wall_time": round(time.time(), 3),  # seconds since 1970
        "seconds": round(progress.elapsed, 3),  # of training, without pauses
        "peak_memory": peak(run.device.type),  # bytes
    }
    if resumed:
        found["resumed"] = True
    return {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}


def part_done(run: Run) -> float:
    """How much of the run is done, from 0 to 1, by its steps or its time."""
    settings, progress = run.settings, run.progress
    done = [progress.step / settings.max_steps] if settings.max_steps else []
    if settings.max_minutes:
        done.append(progress.elapsed / (60 * settings.max_minutes))
    return min(1.0, max(done))


def text(run: Run, speed: float) -> str:
    """The progress of a run in words."""
    settings, progress = run.settings, run.progress
    of = f" of {settings.max_steps:,}" if settings.max_steps else ""
    memory = peak(run.device.type)
    size = f", {memory / 1e9:.2f} GB" if memory else ""
    return f"step {progress.step:,}{of}: loss {progress.mean_loss:.3f}, {speed:,.0f} tokens/s{size}"
