"""Code in a process of its own, forked from one that has imported torch, where that is possible."""

import multiprocessing
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from pathlib import Path


def _execute(code: str, out: Path) -> None:
    with out.open("w") as file, redirect_stdout(file):
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=file)
            sys.exit(1)


def python(code: str) -> str:
    """What the code prints. It must end without an error."""
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        process = context.Process(target=_execute, args=(code, out))
        process.start()
        process.join()
        said = out.read_text()
    assert process.exitcode == 0, said
    return said
