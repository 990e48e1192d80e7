"""The progress bar of a training run: step, loss, speed, memory and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ysnake.training.run import Run

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(run: Run, console: "Console") -> Iterator[Callable[[float], None]]:
    """A progress bar with loss, speed, memory and time left; yields the function that moves it."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    settings, progress = run.settings, run.progress
    columns = ("loss {task.fields[loss]:.3f}", "{task.fields[speed]:,.0f} tokens/s")
    columns = [TextColumn(text) for text in (*columns, "{task.fields[memory]}")]
    bar = Bar(
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        *columns,
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
        shown = {"step": progress.step, "loss": progress.mean_loss, "speed": speed}
        bar.update(task, completed=max(done), memory=peak_memory(run.device.type), **shown)

    with bar:
        yield show


def peak_memory(device: str) -> str:
    """The most memory used so far, of the GPU or of this process; empty where it is not known."""
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
