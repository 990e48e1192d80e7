"""How this process was started: alone, or by a launcher such as torchrun as one of several.

Only this file knows the launcher's environment variables that identify a launch.
"""

import argparse
import io
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from ysnake.shared import cli
from ysnake.shared.errors import InputError

TORCHRUN = "torchrun --nproc-per-node N -m ysnake.train ..."
REPORT_TIME = 10  # seconds that torchrun has to report the rank that failed first
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has restarted these processes
LAUNCH = "TORCHELASTIC_RUN_ID"  # the name of this launch, from --rdzv-id
UNNAMED = "none"  # torchrun's name for a launch without --rdzv-id
SIGNATURE = "launch.txt"  # in a run folder: which launch of torchrun started the run


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def processes() -> int:
    """How many processes this launch has, on all machines together."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def processes_here() -> int:
    """How many of them run on this machine and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def identity() -> str | None:
    """The name of this launch of torchrun. All processes share it, also after a restart."""
    name = os.environ.get(LAUNCH)
    if name != UNNAMED:
        return name
    if (
        os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    ):  # one torchrun is the parent of all processes
        return f"process {os.getppid()} on {socket.gethostname()}"
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def record_launch(folder: Path) -> None:
    """Write into the folder of a new run which launch started it, if a launcher did."""
    if name := identity():
        (folder / SIGNATURE).write_text(name, encoding="utf-8")


def resumed_after_restart(argv: list[str]) -> list[str]:
    """The command line. After a restart by torchrun it resumes the run that this launch started.

    torchrun counts a restart after a failure. It counts none when the number of machines changes.
    Then only the launch's name tells a restart from a start, so torchrun needs a --rdzv-id and the
    command line a --run.
    """
    if "--resume" in argv:
        return argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run", type=Path)
    run = first.parse_known_args(argv)[0].run
    restarted = int(os.environ.get(RESTARTS, 0)) > 0
    if not restarted and (run is None or os.environ.get(LAUNCH, UNNAMED) == UNNAMED):
        return argv
    for folder in cli.runs() if run is None else [run]:
        path = folder / SIGNATURE
        if path.is_file() and path.read_text(encoding="utf-8") == identity():
            return [*argv, "--resume", "--run", str(folder)]
    return argv


@contextmanager
def printed_once() -> Iterator[None]:
    """Run a block that does the same on every rank. Only the first rank prints, errors too."""
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except InputError as error:
            end_after_failed_rank(cli.WRONG_INPUT, error)
        except SystemExit as error:
            if error.code:
                end_after_failed_rank(error.code, error)
            raise


def end_after_failed_rank(code: Any, cause: BaseException) -> NoReturn:
    """End this process after the rank that failed has printed its error and been reported."""
    time.sleep(REPORT_TIME)
    raise SystemExit(code) from cause
