"""A process that has everything imported, and forks one that trains for each command it reads.

A line of standard input is {"argv": [...], "seconds": when to kill it with -9, or null, "path":
what to wait for after that, or null}; the answer is a line with the seconds it took, its exit
status, and what it wrote to standard error.
"""

import json
import os
import select
import signal
import sys
import tempfile
import time

import matplotlib.figure  # noqa: F401  (what a run imports while it runs)
import rich.progress  # noqa: F401
import torch._dynamo  # noqa: F401  (two seconds, for the first optimiser)

from ysnake import train
from ysnake.checkpoints import checkpoint  # noqa: F401
from ysnake.shared import cli
from ysnake.training import plot  # noqa: F401


def child(argv: list[str], errors: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    sys.argv = ["train", *argv]
    cli.run(train.main)


def main() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        began = time.monotonic()
        with tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if pid == 0:
                child(command["argv"], errors.fileno())
            ended = os.pidfd_open(pid)
            path, over = command["path"], select.select([ended], [], [], command["seconds"])[0]
            while path and not over and not os.path.exists(path):
                over = select.select([ended], [], [], 1e-4)[0]
            if not over:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            os.close(ended)
            errors.seek(0)
            text = errors.read().decode(errors="replace")
        answer = {"seconds": time.monotonic() - began, "errors": text}
        print(json.dumps(answer | {"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
