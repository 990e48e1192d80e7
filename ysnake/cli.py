"""What the command lines share: options from a dataclass, errors in one line, exit codes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from ysnake.config import InputError

if TYPE_CHECKING:
    from rich.console import Console

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
RUNS = Path("runs")

Options = TypeVar("Options")


def parse(
    options: type[Options], argv: list[str], program: str, default: Options | None = None
) -> Options:
    """The options given to `program`; `--help` and what cannot be read end the process."""
    return tyro.cli(
        options,
        prog=f"python -m ysnake.{program}",
        args=argv,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def run(command: Callable[[list[str]], int]) -> None:
    """Run a command with the arguments of this process and end the process with its exit code."""
    try:
        code = command(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read our output went away
        sys.stderr.close()
        code = FAILED
    sys.exit(code)


def console() -> "Console":
    """Where a command prints: plain text, wrapped by the terminal alone."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def newest_run() -> Path:
    """The folder of the newest run."""
    found = [p.parent for p in RUNS.glob("*/settings.json")]
    if not found:
        raise InputError(f"{RUNS}: no run there yet; python -m ysnake.train makes one")
    return max(found, key=lambda folder: (folder / "settings.json").stat().st_mtime)


def pick_device(name: str) -> str:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        InputError: the device is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(name.split(":")[0], False):
        raise InputError(f"device: {name} is not available here")
    return name
