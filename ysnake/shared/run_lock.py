"""A lock file: one process at a time writes a run folder or a checkpoint.

The lock belongs to the process and ends with it, however the process ends. What stays in the folder
after a kill is a file that nobody has locked.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

TRAINING = "train.lock"  # in the folder of a run, while a process trains it
# what a file system without locks answers
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LONGEST_NAME = 200  # characters of a lock file that are shown
BEYOND = 1 << 30  # the byte that is locked on Windows, where locked bytes cannot be read
POLL = 0.02  # seconds between two tries


@contextmanager
def lock(path: Path, busy: str, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock file `path` as long as the block runs, then remove it.

    Yields whether there is a lock. Where the file system has none, a warning says so once.

    Args:
        path: made if it is not there.
        busy: the message if another process holds the lock; that process is named after it.
        patience: seconds to wait for the other process.

    Raises:
        InputError: another process holds the lock.
        OSError: the file cannot be written.
    """
    descriptor = _locked(path, busy, time.monotonic() + patience)
    if descriptor is None:
        _warn_once(path.parent)
        yield False
        return
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield True
    finally:
        if os.name == "nt":  # where an open file cannot be removed
            os.close(descriptor)
            with suppress(OSError):  # another process has opened it already
                path.unlink()
        else:
            with suppress(OSError):  # the folder was removed, or became read-only
                path.unlink()
            os.close(descriptor)


def held(path: Path) -> bool:
    """Whether a process holds the lock file `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # not there, or not for us to open
        return False
    try:
        return _try(descriptor) is False
    finally:
        os.close(descriptor)


def _locked(path: Path, busy: str, until: float) -> int | None:
    """A descriptor of the file `path`, locked; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        keep = False
        try:
            free = _try(descriptor)
            if free is None:
                return None
            if not free and time.monotonic() >= until:
                raise InputError(f"{busy} ({_owner(descriptor)})")
            keep = free and _is_at(path, descriptor)
            if keep:
                return descriptor
        finally:
            if not keep:
                os.close(descriptor)
        if not free:
            time.sleep(POLL)


def _try(descriptor: int) -> bool | None:
    """Lock an open file. False if another process has; None where the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, BEYOND, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has its name; the process before removes it as it ends."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    name = os.read(descriptor, LONGEST_NAME).decode(errors="replace")
    return name or "which has just begun"


@cache
def _warn_once(folder: Path) -> None:
    warning = f"{folder}: this file system has no locks, so a second process here is not noticed"
    logging.getLogger(__name__).warning("%s", escape_controls(f"warning: {warning}"))
