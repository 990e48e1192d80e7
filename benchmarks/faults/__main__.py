"""`python -m benchmarks.faults --minutes N`: disturb trainings, files and servers at random.

It prints counts while it runs. Once something is lost or broken, it prints what, and how to repeat
it, and ends with exit code 1. It runs on Linux only, since other systems have no pidfd and no
/proc.
"""

import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.faults.clients import Clients
from benchmarks.faults.files import Files
from benchmarks.faults.kills import Kills
from benchmarks.faults.lost import Lost
from benchmarks.faults.requests import Requests
from benchmarks.faults.restarts import Restarts

PARTS = {
    "kills": Kills,
    "requests": Requests,
    "files": Files,
    "clients": Clients,
    "restarts": Restarts,
}
# seconds of each part before the next part takes its turn
TURNS = {"kills": 30.0, "requests": 15.0, "files": 15.0, "clients": 120.0, "restarts": 0.0}


@dataclass
class Options:
    """Disturb trainings, files and servers until something is lost or the time is over."""

    minutes: float = 60.0
    """Minutes that the test takes."""
    part: tuple[Literal["kills", "requests", "files", "clients", "restarts"], ...] = (
        *("kills", "requests", "files"),
    )
    """Parts of the test, which take turns (see docs/robustness.md)."""
    seed: int = 0
    """Determines the faults, but not where exactly a process is when it is killed."""


def main(argv: list[str]) -> int:
    """Run the test as the command line says. Returns the exit code."""
    options = tyro.cli(Options, prog="python -m benchmarks.faults", args=argv)
    folder = Path(tempfile.mkdtemp(prefix="ysnake-faults-"))
    began = time.monotonic()
    until = began + 60 * options.minutes
    parts = {}
    try:
        for name in options.part:
            parts[name] = PARTS[name](make(folder / name), options.seed)
        while True:
            for name, part in parts.items():
                left = until - time.monotonic()
                said = part.go(max(1.0, min(TURNS[name], left)))
                print(f"{(time.monotonic() - began) / 60:6.1f} min  {said}", flush=True)
            if time.monotonic() >= until:
                break
    except Lost as lost:
        print(f"LOST, with --seed {options.seed}: {lost}\nall files are in {folder}")
        return 1
    finally:
        for part in parts.values():
            part.close()
    shutil.rmtree(folder, ignore_errors=True)
    print("nothing was lost")
    return 0


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its servers end too
    sys.exit(main(sys.argv[1:]))
