"""A run under torchrun whose ranks are killed again and again. It must still end by itself.

Its losses must be equal to those of an undisturbed run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.faults.kills import OPTIONS, corpus
from benchmarks.faults.lost import Lost, environment

PROCESSES = 2
STEPS_BETWEEN = 6  # least number of steps from one kill to the next
LONGEST = 180.0  # most seconds from one kill to the next


class Restarts:
    """The attack on runs under torchrun, one after another."""

    name = "ranks killed under torchrun --max-restarts"

    def __init__(self, folder: Path, seed: int, kills: int = 10):
        self.folder, self.kills = folder, kills
        self.chance = random.Random(seed)
        self.steps = (kills + 1) * STEPS_BETWEEN
        self.data = corpus(folder / "snakes.txt")
        self.count, self.runs = 0, 0
        self.undisturbed = folder / "whole"
        if launched(self.argv(self.undisturbed), 0, folder / "whole.log").wait():
            raise Lost("the undisturbed run failed")

    def argv(self, run: Path) -> list[str]:
        argv = [*OPTIONS.split(), "--carry-state", "--data", str(self.data), "--run", str(run)]
        return [*argv, "--max-steps", str(self.steps), "--checkpoint-every", "2"]

    def go(self, seconds: float) -> str:
        """Kill ranks for this many seconds, but at least in one run. Returns a summary."""
        until = time.monotonic() + seconds
        while True:
            self.one_run(self.folder / f"run{self.runs}")
            self.runs += 1
            if time.monotonic() >= until:
                return (
                    f"{self.count} {self.name} in {self.runs} runs, all equal to an undisturbed one"
                )

    def one_run(self, run: Path) -> None:
        process = launched(self.argv(run), self.kills, run.with_suffix(".log"))
        try:
            for number in range(self.kills):
                self.wait_for_step(process, run, number)
                self.kill_a_rank(process)
            code = process.wait(LONGEST)
        finally:
            process.kill()
        if code:
            raise Lost(f"torchrun ended with {code} after {self.count} kills, see {run}")
        if losses(run) != losses(self.undisturbed):
            raise Lost(f"other losses than those of {self.undisturbed}, see {run}")

    def wait_for_step(self, process: subprocess.Popen, run: Path, number: int) -> None:
        """Wait until the run has made some steps since the last kill."""
        wanted = number * STEPS_BETWEEN + self.chance.randint(1, STEPS_BETWEEN)
        until = time.monotonic() + LONGEST
        while steps_done(run) < wanted:
            if process.poll() is not None or time.monotonic() > until:
                raise Lost(
                    f"after {number} kills no step {wanted} (exit code {process.poll()}), see {run}"
                )
            time.sleep(0.02)

    def kill_a_rank(self, process: subprocess.Popen) -> None:
        rank = self.chance.randrange(PROCESSES)
        until = time.monotonic() + LONGEST
        while time.monotonic() < until:
            for pid in children(process.pid):
                if is_rank(pid, rank):
                    os.kill(pid, signal.SIGKILL)
                    self.count += 1
                    return
            time.sleep(0.05)
        raise Lost(f"there is no rank {rank}")

    def close(self) -> None:
        """Do nothing: no process is left."""


def launched(argv: list[str], restarts: int, log: Path) -> subprocess.Popen:
    """Start torchrun with this many restarts. All errors go to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), "--max-restarts", str(restarts)]
    with log.open("w") as errors:
        return subprocess.Popen(
            [*command, "-m", "--", "ysnake.train", *argv],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_rank(pid: int, rank: int) -> bool:
    try:
        return f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:  # the process has just ended
        return False


def steps_done(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, LookupError, ValueError):  # there is no line yet, or half a line
        return 0


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train_loss"], line.get("val_loss")) for line in lines]
