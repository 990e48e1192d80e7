"""How this process was started: alone, or by a launcher such as torchrun as one of several.

Knows the launcher's environment variables, and what of a command line several processes can share.
"""

import argparse
import io
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ysnake.model.config import ModelConfig
from ysnake.shared import cli
from ysnake.shared.errors import InputError

if TYPE_CHECKING:
    from ysnake.training.settings import Settings

TORCHRUN = "torchrun --nproc-per-node N -m ysnake.train ..."
TO_BE_NAMED = 10  # seconds in which torchrun names the rank that failed first, and ends the others
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
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or "--resume" in argv:
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


def check(settings: "Settings") -> None:
    """Raise InputError where these settings cannot be shared out to the processes there are."""
    size, context = int(os.environ.get("WORLD_SIZE", 1)), settings.context_parallel
    if not launched():
        if settings.shard or context > 1:
            option = "--shard" if settings.shard else "--context-parallel"
            raise InputError(f"{option}: needs several processes; start them with {TORCHRUN}")
        return
    if size % context:
        raise InputError(
            f"--context-parallel: expected a divisor of {size} processes, got {context}"
        )
    if settings.seq_len % context:
        raise InputError(
            f"--seq-len: {settings.seq_len} tokens cannot be split evenly over the {context} "
            "processes of --context-parallel"
        )
    if settings.seq_len // context < ModelConfig.conv_width - 1:
        raise InputError(
            f"--seq-len: {settings.seq_len // context} tokens for each of {context} processes are "
            "fewer than the convolution reaches back"
        )
    if settings.batch_size % (size // context):
        raise InputError(
            f"--batch-size: {settings.batch_size} sequences cannot be shared out evenly to "
            f"{size // context} {'groups of ' * (context > 1)}processes; it counts those of all"
        )
    if size > 1 and settings.memory is not None and not settings.resume:
        raise InputError(
            "--memory: plans for one process; with several give --batch-size, --accumulate and "
            "--recompute"
        )
    if context > 1 and settings.carry_state:
        raise InputError("--carry-state: hands states on in time, so not with --context-parallel")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"--device: expected auto, cpu or cuda with many processes, got {settings.device}"
        )


def share(settings: "Settings") -> tuple[int, int]:
    """The windows of a batch that one process takes, and how many tokens of each."""
    size, context = int(os.environ.get("WORLD_SIZE", 1)), settings.context_parallel
    return -(-settings.batch_size // max(1, size // context)), settings.seq_len // context
