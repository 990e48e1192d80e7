"""`python -m ysnake.runs`: list the runs in runs/, or compare two runs."""

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ysnake.shared import cli, run_files
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json
from ysnake.shared.shown import escape_controls
from ysnake.training.options import BETA2
from ysnake.training.settings import OF_A_LAUNCH, OF_OLD_RUNS

Shown = Callable[[str, Any], str]  # a value of a summary, by its name, as text
OTHER_TOKENIZERS = (
    "the runs have different tokenizers: nats per token cannot be compared, so the picture has "
    "bits per byte"
)
FORMATS = {
    "parameters": "{:,}",
    "steps": "{:,}",
    "loss": "{:.3f}",
    "best held-out loss": "{:.3f}",
    "best bits per byte": "{:.4f}",
    "tokens/s": "{:,.0f}",
}


@dataclass
class Options:
    """List the runs in runs/. The newest is first."""

    compare: Annotated[tuple[Path, Path] | None, arg(metavar="RUN RUN")] = None
    """Compare two runs: print the settings in which they differ, and draw both losses. The name
    of a run in runs/ is enough."""
    picture: Annotated[Path, arg(metavar="FILE")] = Path("compare.png")
    """The file that --compare draws into."""
    csv: bool = False
    """Print CSV instead of a table."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """List or compare as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("runs", program))
    shown = as_plain_value if options.csv else as_text
    compared = options.compare
    if compared:
        compared = cli.find_run(compared[0]), cli.find_run(compared[1])
    if compared:
        rows = comparison(*compared, shown)
    else:
        if prepared := cli.being_made():
            print(escape_controls(prepared), file=sys.stderr)
            if not cli.runs():
                return cli.DONE
        rows = listing(shown)
    if options.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    else:
        show(rows)
    if compared:
        learnt = {tokenizer(folder) for folder in compared} - {None}
        if per_byte := len(learnt) > 1:
            print(OTHER_TOKENIZERS, file=sys.stderr)
        draw(*compared, options.picture, per_byte)
    return cli.DONE


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns. A terminal wraps lines that are too long for it."""
    rows = [[escape_controls(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


def tokenizer(folder: Path) -> bytes | None:
    """The content of the run's tokenizer.json; None if there is no checkpoint."""
    path = folder / "last" / "tokenizer.json"
    return path.read_bytes() if path.is_file() else None


def listing(shown: Shown) -> list[list[str]]:
    """The table of all runs, with its headings."""
    folders = sorted(cli.runs(), key=run_files.changed, reverse=True)
    if not folders:
        raise InputError(cli.no_run())
    found = [summary(folder, shown) for folder in folders]
    return [list(found[0]), *(list(each.values()) for each in found)]


def summary(folder: Path, shown: Shown) -> dict[str, str]:
    """The summary of a run, as text. The state of a damaged run says why it cannot be read."""
    try:
        found = run_files.summary(folder)
    except (InputError, OSError) as error:
        known = {"run": str(folder), "state": f"cannot be read: {error}"}
        found = {**dict.fromkeys(run_files.SUMMARY), **known, "when": run_files.changed(folder)}
    return {name: shown(name, value) for name, value in found.items()}


def as_text(name: str, value: Any) -> str:
    """A value of a summary for people."""
    if name == "when":
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    return "" if value is None else FORMATS.get(name, "{}").format(value)


def as_plain_value(name: str, value: Any) -> str:
    """A value of a summary for programs: numbers without separators, times as in ISO 8601."""
    if name == "when":
        return datetime.fromtimestamp(value).astimezone().isoformat(timespec="seconds")
    return "" if value is None else str(value)


def comparison(first: Path, second: Path, shown: Shown) -> list[list[str]]:
    """The table of what differs between two runs: settings, then results."""
    if first.resolve() == second.resolve():
        raise InputError(f"expected two different runs, got {first} twice", field="--compare")
    for folder in (first, second):
        if not (folder / run_files.SETTINGS).exists():
            raise InputError(f"{folder}: not a run, it has no {run_files.SETTINGS}")
    a, b = (settings_used(folder) for folder in (first, second))
    rows = [["", str(first), str(second)]]
    for name in dict.fromkeys([*a, *b]):
        if name not in ("run", *OF_A_LAUNCH) and a.get(name) != b.get(name):
            rows.append([name, str(a.get(name)), str(b.get(name))])
    results = [summary(folder, shown) for folder in (first, second)]
    names = [name for name in results[0] if name not in ("run", "data")]  # these are above
    return rows + [[name, *(r[name] for r in results)] for name in names]


def settings_used(folder: Path) -> dict[str, Any]:
    """The stored settings of a run, with the values that were used where none is stored."""
    path = folder / run_files.SETTINGS
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise InputError(f"{path}: damaged (expected an object)")
    values: dict[str, Any] = OF_OLD_RUNS | stored
    if values["beta2"] is None:
        values["beta2"] = BETA2.get(values["optimizer"])
    return values


def draw(first: Path, second: Path, picture: Path, per_byte: bool) -> None:
    """Draw the losses of two runs into one picture."""
    from ysnake.training.plot import plot_two

    with cli.file_errors(picture):
        lines = {str(folder): run_files.metrics(folder) for folder in (first, second)}
        plot_two(lines, picture, per_byte)
    print(f"picture: {escape_controls(str(picture))}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
