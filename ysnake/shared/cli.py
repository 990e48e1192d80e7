"""What the command lines share: options from a dataclass, errors in one line, exit codes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from ysnake.shared import terminal
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from rich.console import Console

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
RUNS = Path("runs")
MOST_THREADS = 4096

Options = TypeVar("Options")
through_ysnake = False  # whether this process is the program `ysnake`


def command_line(program: str) -> str:
    """How a command is called in the way that the user called this one."""
    if through_ysnake:
        return f"ysnake {program.replace('_', '-')}"
    return f"python -m ysnake.{program}"


def parse(
    options: type[Options], argv: list[str], program: str, default: Options | None = None
) -> Options:
    """The options given to `program`; `--help` and what cannot be read end the process."""
    return tyro.cli(
        options,
        prog=command_line(program),
        args=argv,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def run(command: Callable[[list[str]], int]) -> None:
    """Run a command with the arguments of this process and end the process with its exit code."""
    terminal.prepare()
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
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = escape_controls(f"{where}{error.strerror or error}")
        print(f"error: {message}", file=sys.stderr)
        code = FAILED
    except (MemoryError, RuntimeError) as error:
        said = ("allocate memory", "out of memory")  # by torch, on a CPU and on a GPU
        if not (isinstance(error, MemoryError) or any(text in str(error) for text in said)):
            raise
        print(
            "error: not enough memory; smaller sizes or a smaller batch need less", file=sys.stderr
        )
        code = FAILED
    sys.exit(code)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here because of the disk becomes an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}") from error


def console() -> "Console":
    """Where a command prints: plain text, wrapped by the terminal alone.

    A command goes on when the terminal is closed or the reader of its output has ended.
    """
    from rich.console import Console

    out = sys.stdout and terminal.LastingOutput(sys.stdout)
    return Console(file=out, highlight=False, soft_wrap=True)


def markup(text: object) -> str:
    """Text of others, such as a path, for a place where rich reads markup: shown as it is."""
    from rich.markup import escape

    return escape(escape_controls(str(text)))


def runs() -> list[Path]:
    """The folders of all runs in runs/. A hidden folder is no run."""
    found = RUNS.glob("*/settings.json")
    return [path.parent for path in found if not path.parent.name.startswith(".")]


def newest_run() -> Path:
    """The folder of the run that was begun or resumed last."""
    found = runs()
    if not found:
        raise InputError(f"{RUNS}: no run there yet; {command_line('train')} makes one")
    return max(found, key=lambda folder: (folder / "settings.json").stat().st_mtime)


def pick_device(name: str) -> str:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        InputError: the device is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: expected auto, cpu, cuda or mps, got {name}") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (device.index or 0) >= count.get(device.type, 0):
        raise InputError(f"device: {name} is not available here")
    return name


def tune_memory() -> None:
    """For commands that read and write text on a CPU: huge pages, from which weights are read
    faster at the cost of some memory, and no memory given back between the pieces of a prompt.
    """
    import torch
    from ysnake_kernels.allocator import keep_freed_memory

    keep_freed_memory()
    name = "THP_MEM_ALLOC_ENABLE"
    if name not in os.environ:
        os.environ[name] = "1"
        torch.empty(1)  # torch looks once, when it makes its first tensor
        del os.environ[name]  # not for processes that this one starts


def use_threads(count: int | None) -> None:
    """Compute with so many threads on the CPU; None leaves that to torch.

    Raises:
        InputError: not a number of threads.
    """
    import torch

    if count is not None:
        if not 1 <= count <= MOST_THREADS:
            raise InputError(f"--threads: expected 1 to {MOST_THREADS}, got {count}")
        torch.set_num_threads(count)
