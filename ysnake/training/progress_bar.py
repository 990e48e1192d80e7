"""The progress bar of a training run: step, loss, speed, memory and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ysnake.training.run import Run

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(run: Run, console: "Console") -> Iterator[Callable[[float], None]]:
    """Show a progress bar while the block runs. Yields a function that updates it."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    settings, progress = run.settings, run.progress
    bar = Bar(
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TextColumn("{task.fields[memory]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.quiet,
    )
    task = bar.add_task("", total=1.0, step=progress.step, loss=0.0, speed=0.0, memory="")

    def show(speed: float) -> None:
        done = [progress.step / settings.max_steps] if settings.max_steps else []
        if settings.max_minutes:
            done.append(progress.elapsed / (60 * settings.max_minutes))
        bar.update(
            task,
            completed=max(done),
            step=progress.step,
            loss=progress.mean_loss,
            speed=speed,
            memory=peak_memory(run.device.type),
        )

    with bar:
        yield show


def peak_memory(device: str) -> str:
    """The peak memory so far, of the GPU or of this process; empty if unknown."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
