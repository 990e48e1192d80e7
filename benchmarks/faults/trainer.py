"""A process that has imported everything, and forks trainings. So a training begins at once.

`Trainer` starts the process. A command is a line of JSON on its standard input, an answer a line of
JSON on its standard output. It runs on Linux only, since it waits for processes by `pidfd_open`.
"""

import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

WRITING = ("fsync", "rename", "replace", "truncate")  # of `os`; most calls are in a save
LONGEST = 180.0  # seconds that a training may take
AFTER_FAILURE = 0.1  # seconds until torchrun sends the other ranks a signal, and sends it again


@dataclass
class SentSignal:
    """A signal that some ranks of a training get at a certain moment.

    Args:
        signal: the number of the signal.
        ranks: which ranks it is sent to.
        seconds: time after the start.
        calls: if given, the moment is when a rank calls functions of `WRITING` for this many times.
    """

    signal: int
    ranks: tuple[int, ...]
    seconds: float = 0.0
    calls: int | None = None


@dataclass
class Ended:
    """How a training ended: its time, the exit status of each rank, and all of stderr."""

    seconds: float
    codes: list[int]
    errors: str
    hung: bool = False


class Trainer:
    """Trains in forked processes, each with one thread."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.trainer"],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(
        self,
        *argv: str | Path,
        processes: int = 1,
        sent: SentSignal | None = None,
        file_limit: int | None = None,
    ) -> Ended:
        """Run `python -m ysnake.train` with these arguments, and wait for its end.

        Args:
            argv: the command line.
            processes: number of ranks, with the environment that torchrun gives them.
            sent: a signal to send.
            file_limit: largest size of a file in bytes, as with a full disk or quota.
        """
        command = {
            "argv": [*map(str, argv)],
            "processes": processes,
            "sent": sent and asdict(sent),
            "file_limit": file_limit,
        }
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(60)


def serve() -> None:
    """Answer the commands on standard input until it ends."""
    import rich.progress  # noqa: F401  (what a run imports while it runs)
    import torch._dynamo  # (two seconds, for the first optimizer)
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    from ysnake import train  # noqa: F401
    from ysnake.checkpoints import checkpoint  # noqa: F401
    from ysnake.training import evaluation, plot

    evaluation.SAMPLE_TOKENS = 8  # so that a run spends more of its time in steps and saves
    with tempfile.TemporaryDirectory() as folder:  # the first picture searches for fonts
        Path(folder, "metrics.jsonl").write_text('{"step": 1, "train_loss": 1, "val_loss": 1}')
        plot.plot_loss(Path(folder))
    for line in sys.stdin:
        command = json.loads(line)
        sent = SentSignal(**command["sent"]) if command["sent"] else None
        ended = run(command["argv"], command["processes"], sent, command["file_limit"])
        print(json.dumps(asdict(ended)), flush=True)


def run(argv: list[str], processes: int, sent: SentSignal | None, file_limit: int | None) -> Ended:
    """Fork the ranks of a training, send the signal, and wait until all have ended."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        launch = launch_environment(processes) if processes > 1 else {}
        pids = []
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                os.environ.update(launch)
                if launch:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                if sent is not None and sent.calls is not None and rank in sent.ranks:
                    signal_within(sent.calls, sent.signal)
                train(argv, errors.fileno(), file_limit)
            pids.append(pid)
        codes = Ranks(pids)
        if sent is not None and sent.calls is None and not codes.any_ended(sent.seconds):
            codes.send(sent.signal, sent.ranks)
        hung = codes.wait(began + LONGEST)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return Ended(time.monotonic() - began, codes.codes, text, hung)


def launch_environment(processes: int) -> dict[str, str]:
    """The environment variables that torchrun sets for all ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    size = str(processes)
    return {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def signal_within(calls: int, number: int) -> None:
    """Send this process a signal at this many calls of functions of `WRITING`."""
    made = itertools.count(1)

    def counted(real: Callable, *arguments: Any, **more: Any) -> Any:
        if next(made) == calls:
            os.kill(os.getpid(), number)
        return real(*arguments, **more)

    for name in WRITING:
        setattr(os, name, partial(counted, getattr(os, name)))


def train(argv: list[str], errors: int, file_limit: int | None) -> None:
    """Train in this process, and end it."""
    from ysnake import train
    from ysnake.shared import cli

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    sys.argv = ["train", *argv]
    try:
        cli.run(train.main)
    except SystemExit as ended:
        sys.stderr.flush()
        os._exit(ended.code)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)


class Ranks:
    """The processes of a training, by rank, and how they ended."""

    def __init__(self, pids: list[int]):
        self.pids = pids
        self.codes: list[int | None] = [None] * len(pids)
        self.descriptors = [os.pidfd_open(pid) for pid in pids]

    def alive(self) -> list[int]:
        return [rank for rank, code in enumerate(self.codes) if code is None]

    def any_ended(self, seconds: float) -> bool:
        """Wait for this many seconds, or until a rank ends. Returns whether one has ended."""
        waiting = {self.descriptors[rank]: rank for rank in self.alive()}
        for descriptor in select.select([*waiting], [], [], max(0.0, seconds))[0]:
            rank = waiting[descriptor]
            _, status = os.waitpid(self.pids[rank], 0)
            self.codes[rank] = os.waitstatus_to_exitcode(status)
            os.close(descriptor)
        return len(self.alive()) < len(self.pids)

    def send(self, number: int, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            if self.codes[rank] is None:
                os.kill(self.pids[rank], number)

    def wait(self, until: float) -> bool:
        """Wait until all have ended. Once one has failed, end the others, as torchrun does.

        A rank that has not ended at the time `until` is killed. Returns whether there was one.
        """
        while alive := self.alive():
            failed = any(self.codes)
            self.any_ended(AFTER_FAILURE if failed else until - time.monotonic())
            if failed:
                self.send(signal.SIGTERM, tuple(self.alive()))
            if self.alive() and time.monotonic() >= until:
                self.send(signal.SIGKILL, tuple(alive))
                while self.alive():
                    self.any_ended(LONGEST)
                return True
        return False


if __name__ == "__main__":
    serve()
