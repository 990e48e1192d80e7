"""The folder of a new run. It is made under a hidden name and renamed once it is complete.

The process holds a lock file beside the hidden folder from before the folder exists until after it
is renamed. So the next start recognises what a killed process left behind, and removes it.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from ysnake.shared import run_lock
from ysnake.shared.errors import InputError, why
from ysnake.shared.files import patiently

Result = TypeVar("Result")


def make(wanted: Path | None, default: Path, fill: Callable[[Path], Result]) -> tuple[Path, Result]:
    """Make the folder of a new run. Returns it, and what `fill` returned.

    Args:
        wanted: the folder that the user asked for.
        default: the folder if the user asked for none. If it exists, -2, -3, ... is appended.
        fill: writes the content of the hidden folder. If it fails, the folder is removed.

    Raises:
        InputError: the folder already exists, or cannot be written.
    """
    check_free(wanted)
    base = wanted or default
    parent_is_new = not base.parent.exists()
    remove_leftovers(base.parent)
    new = base.with_name(f".{base.name}.{secrets.token_hex(4)}.new")
    try:
        if base.parent.exists() and not base.parent.is_dir():  # mkdir would say "File exists"
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        base.parent.mkdir(parents=True, exist_ok=True)
        busy = f"{base}: another process removes this folder"
        with run_lock.lock(new.with_suffix(".lock"), busy, run_lock.LOOK):
            try:
                new.mkdir()
                result = fill(new)
                return _rename(new, base, wanted is None), result
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except BaseException as error:
        if parent_is_new:
            with suppress(OSError):  # another process has started a run there
                base.parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{base}: {why(error)}") from error
        raise


def check_free(wanted: Path | None) -> None:
    """Raise InputError if the folder for a new run already exists."""
    if wanted is not None and os.path.lexists(wanted):
        raise InputError(
            f"{wanted}: already exists; name another folder, or continue that run with --resume"
        )


def _rename(new: Path, base: Path, or_a_neighbour: bool) -> Path:
    for number in count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            if os.path.lexists(folder):
                raise FileExistsError
            return patiently(partial(new.rename, folder))
        except OSError:  # another process was faster; the error depends on the system
            if not os.path.lexists(folder):
                raise
            if not or_a_neighbour:
                check_free(folder)
    raise AssertionError("the numbers have no end")


def remove_leftovers(parent: Path) -> None:
    """Remove the hidden folders of processes that were killed while they started a run."""
    for mark in parent.glob(run_lock.STARTING):
        busy = f"{mark.with_suffix('.new')}: another process starts a run there"
        # an error: that process is still running, or has just ended
        with suppress(InputError, OSError), run_lock.lock(mark, busy) as held:
            if held:
                shutil.rmtree(mark.with_suffix(".new"), ignore_errors=True)
