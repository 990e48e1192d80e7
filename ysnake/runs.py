"""`python -m ysnake.runs`: list the runs of this folder, or compare two."""

import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json
from ysnake.shared.shown import escape_controls

COLUMNS = ("run", "state", "parameters", "steps", "loss", "best held-out loss", "tokens/s", "when")


@dataclass
class Options:
    """List the runs in runs/, the newest first."""

    compare: Annotated[tuple[Path, Path] | None, arg(metavar="RUN RUN")] = None
    """Show in what two runs differ, and draw their losses into one picture."""
    picture: Annotated[Path, arg(metavar="FILE")] = Path("compare.png")
    """Where --compare draws."""
    csv: bool = False
    """Print the table as CSV."""


def main(argv: list[str]) -> int:
    """List or compare as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, "runs")
    if options.compare is not None:
        return compare(*options.compare, options.picture)
    found = sorted(cli.runs(), key=changed, reverse=True)
    if not found:
        raise InputError(f"{cli.RUNS}: no run there yet; {cli.command_line('train')} makes one")
    rows = [row(folder) for folder in found]
    if options.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
        return cli.DONE
    show([COLUMNS, *rows])
    return cli.DONE


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; the terminal wraps what is wider than it."""
    rows = [[escape_controls(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


def changed(folder: Path) -> float:
    """When a run was last begun, resumed or saved, in seconds since 1970."""
    written = (folder / "settings.json", folder / "metrics.jsonl")
    return max((path.stat().st_mtime for path in written if path.exists()), default=0.0)


def row(folder: Path) -> list[str]:
    """A run as the table shows it."""
    lines = metrics(folder)
    losses = [line["train_loss"] for line in lines[-50:] if line.get("train_loss") is not None]
    held_out = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    speeds = sorted(line["tokens_per_s"] for line in lines if line.get("tokens_per_s"))
    return [
        str(folder),
        state(folder),
        parameters(folder),
        f"{lines[-1]['step']:,}" if lines else "0",
        f"{sum(losses) / len(losses):.3f}" if losses else "",
        f"{min(held_out):.3f}" if held_out else "",
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(changed(folder))),
    ]


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; one that a kill has torn does not count."""
    path = folder / "metrics.jsonl"
    found: list[dict] = []
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def state(folder: Path) -> str:
    """Why a run ended, or whether it is in training or can be resumed."""
    from ysnake.shared import run_lock

    if run_lock.held(folder / run_lock.TRAINING):
        return "in training"
    path = folder / "last" / "progress.json"
    if not path.exists():
        return "no checkpoint"
    return read_json(path).get("ended") or "can be resumed"


def parameters(folder: Path) -> str:
    """How many numbers the weights of a run hold."""
    from safetensors import SafetensorError, safe_open

    path = folder / "last" / "model.safetensors"
    if not path.exists():
        return ""
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError):
        return "damaged"
    count = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        count += size
    return f"{count:,}"


def compare(first: Path, second: Path, picture: Path) -> int:
    """Print the settings in which two runs differ and their losses, and draw both."""
    from ysnake.training.plot import plot_two

    for folder in (first, second):
        if not (folder / "settings.json").exists():
            raise InputError(f"{folder}: not a run, it has no settings.json")
    settings = [read_json(folder / "settings.json") for folder in (first, second)]
    table = [["", str(first), str(second)]]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        values = [each.get(name) for each in settings]
        if values[0] != values[1] and name != "run":
            table.append([name, *map(str, values)])
    for name, *cells in zip(COLUMNS[1:], row(first)[1:], row(second)[1:], strict=True):
        table.append([name, *cells])
    show(table)
    with cli.writing(picture):
        plot_two({first.name: metrics(first), second.name: metrics(second)}, picture)
    print(f"picture: {escape_controls(str(picture))}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
