"""`--log`: the metrics of a run in the user's own tool: TensorBoard, Weights & Biases or Trackio.

Each tool is an extra of the package. It gets the values in a line of metrics.jsonl by their names.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.training.options import Settings
from ysnake.training.run import Run

if TYPE_CHECKING:
    from rich.console import Console

PROJECT = "ysnake"  # of all runs, in the tools that have projects
WANDB_ID = "wandb_id.txt"  # in a run folder: what Weights & Biases calls the run

Values = dict[str, float]


def check(settings: Settings) -> None:
    """Raise InputError if the tool of --log is not installed."""
    tool = settings.log
    if tool is not None and importlib.util.find_spec(tool) is None:
        install = f'pip install -c constraints.txt -e ".[{tool}]"'
        raise InputError(f"{tool} is not installed: {install}", field="--log")


@contextmanager
def tool_log(run: Run, console: "Console") -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the tool of --log while the block runs. Yields a function for the lines of the metrics.

    If the tool fails later, a warning says so, and training goes on without it.

    Raises:
        InputError: the tool cannot be opened. The message has its reason.
    """
    tool = run.settings.log
    if tool is None or not run.ranks.first:
        yield lambda line: None
        return
    try:
        write, close = TOOLS[tool](run)
    except Exception as error:  # each tool has errors of its own
        raise InputError(f"{tool} cannot be used ({_reason(error)})", field="--log") from error
    failed = False

    def attempt(work: Callable[[], None]) -> None:
        nonlocal failed
        try:
            if not failed:
                work()
        except Exception as error:  # for instance a full disk, or no network
            failed = True
            reason = cli.markup(_reason(error))
            console.print(f"warning: {tool} failed and gets no more values ({reason})")

    def log(line: dict[str, Any]) -> None:
        values = {k: float(v) for k, v in line.items() if v is not None and k != "step"}
        attempt(lambda: write(values, line["step"]))

    try:
        yield log
    finally:
        attempt(close)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]


def _config(run: Run) -> dict[str, Any]:
    values = asdict(run.settings).items()
    return {k: str(v) if isinstance(v, Path | tuple) else v for k, v in values}


Tool = tuple[Callable[[Values, int], None], Callable[[], None]]  # writes a step, and closes


def _tensorboard(run: Run) -> Tool:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what was written after the checkpoint from which the run goes on
    folder = str(run.folder / "tensorboard")
    writer = SummaryWriter(folder, purge_step=run.progress.step + 1)  # type: ignore[no-untyped-call]

    def write(values: Values, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step, walltime=values["wall_time"])  # type: ignore[no-untyped-call]

    return write, writer.close


def _wandb(run: Run) -> Tool:
    import wandb

    path = run.folder / WANDB_ID
    known = path.read_text().strip() if path.is_file() else None
    opened = wandb.init(
        project=PROJECT,
        name=run.folder.name,
        id=known,
        resume="allow",
        dir=str(run.folder),
        config=_config(run),
    )
    path.write_text(opened.id + "\n")
    return lambda values, step: opened.log(values, step=step), opened.finish


def _trackio(run: Run) -> Tool:
    import trackio

    trackio.init(
        project=PROJECT,
        name=run.folder.name,
        config=_config(run),
        resume="allow" if run.settings.resume else "never",
        embed=False,
    )
    return lambda values, step: trackio.log(values, step=step), trackio.finish


TOOLS: dict[str, Callable[[Run], Tool]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
