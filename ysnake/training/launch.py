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
from typing import Any

from ysnake.shared import cli
from ysnake.shared.errors import InputError

TORCHRUN = "torchrun --nproc-per-node N -m ysnake.train ..."
TO_BE_NAMED = 10  # seconds in which torchrun names the rank that failed first, and ends the others
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has started these processes again
SIGNATURE = "launch.txt"  # in a run folder: the launch of torchrun that began the run


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def identity() -> str | None:
    """What names this launch of torchrun: the same in all its processes, also after a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":  # what torchrun calls every launch without --rdzv-id
        return name
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # torchrun is the parent of all
        return f"process {os.getppid()} on {socket.gethostname()}"
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def sign(folder: Path) -> None:
    """Write into a new run which launch began it, if a launcher did."""
    if name := identity():
        (folder / SIGNATURE).write_text(name, encoding="utf-8")


def restarted(argv: list[str]) -> list[str]:
    """The command line; after a restart by torchrun it resumes the run that this launch began."""
    if int(os.environ.get(RESTARTS, 0)) == 0 or "--resume" in argv:
        return argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run", type=Path)
    run = first.parse_known_args(argv)[0].run
    for folder in cli.runs() if run is None else [run]:
        path = folder / SIGNATURE
        if path.is_file() and path.read_text(encoding="utf-8") == identity():
            return [*argv, "--resume", "--run", str(folder)]
    return argv


@contextmanager
def heard_once() -> Iterator[None]:
    """For what every rank does alike on its own: the first rank alone prints, errors too."""
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except InputError as error:
            wait_to_be_ended(cli.WRONG_INPUT, error)
        except SystemExit as error:
            if error.code:
                wait_to_be_ended(error.code, error)
            raise


def wait_to_be_ended(code: Any, cause: BaseException) -> None:
    """End after the rank whose error it is, so that it has said its line and is the one named."""
    time.sleep(TO_BE_NAMED)
    raise SystemExit(code) from cause
