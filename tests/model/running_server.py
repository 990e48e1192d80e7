"""A server in a process of its own, with a tiny model, for the tests of its clients."""

import re
import subprocess
import sys
from contextlib import contextmanager

from small import environment

NAME = "snake"


@contextmanager
def serving(folder, *options, **more):
    """Start a server for a checkpoint; gives its address and the process."""
    command = [sys.executable, "-m", "ysnake.serve", str(folder), "--port", "0", "--name", NAME]
    process = subprocess.Popen(
        [*command, "--threads", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=folder.parent,
        **more,
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def options(**more):
    """Ollama's options for a completion that is always the same."""
    return {"seed": 3, "num_predict": 12, **more}
