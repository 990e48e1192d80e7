"""A lock file, so that only one process at a time writes a run folder or a checkpoint.

The operating system releases the lock when the process ends, even if it is killed. A killed process
leaves the file behind, but nobody holds its lock.
"""

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

TRAINING = "train.lock"  # in the folder of a run, while a process trains it
STARTING = f".*.{'[0-9a-f]' * 8}.lock"  # beside the hidden folder of a run that is being made
# errors of a file system that has no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LONGEST_NAME = 200  # characters of a lock file that are shown
LOCKED_BYTE = 1 << 30  # on Windows, where locked bytes cannot be read: far behind the content
POLL = 0.02  # seconds between two tries
LOOK = 0.5  # seconds to wait for a lock that `held` has taken for a moment


@contextmanager
def lock(path: Path, busy: str, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs, then remove it.

    Yields whether the lock is held. On a file system without locks it yields False and warns once.

    Args:
        path: the lock file; it is created if it does not exist.
        busy: the error message if another process holds the lock. It is followed by the name of
            that process.
        patience: seconds to wait for the other process.

    Raises:
        InputError: another process holds the lock.
        OSError: the file cannot be written.
    """
    descriptor = _locked(path, busy, time.monotonic() + patience)
    if descriptor is None:
        warn_of_no_locks(path.parent)
        try:
            yield False
        finally:
            with suppress(OSError):
                path.unlink()
        return
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield True
    finally:
        if os.name == "nt":  # where an open file cannot be removed
            os.close(descriptor)
            with suppress(OSError):  # another process has already opened it
                path.unlink()
        else:
            with suppress(OSError):  # the folder was removed or became read-only
                path.unlink()
            os.close(descriptor)


def held(path: Path) -> bool:
    """Whether a process holds the lock file `path`. It is locked for a moment to find out."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # not there, or not for us to open
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def being_made(parent: Path) -> list[Path]:
    """The runs that processes are making in a folder, each by the name that was asked for."""
    names = (path.name for path in sorted(parent.glob(STARTING)) if held(path))
    return [parent / name[1:].rsplit(".", 2)[0] for name in names]  # .NAME.0123abcd.lock


def _locked(path: Path, busy: str, until: float) -> int | None:
    """Open and lock the file `path`. Returns None on a file system without locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        keep = False
        try:
            free = try_lock(descriptor)
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


def try_lock(descriptor: int) -> bool | None:
    """Try to lock an open file.

    Returns False if another process holds the lock, None on a file system without locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
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
    """Whether `path` still names the open file. Its last holder may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    name = os.read(descriptor, LONGEST_NAME).decode(errors="replace")
    return name or "which has just begun"


@cache
def warn_of_no_locks(folder: Path) -> None:
    """Warn once that the file system of this folder has no locks."""
    warning = f"{folder}: this file system has no locks, so a second process here is not noticed"
    logging.getLogger(__name__).warning("%s", escape_controls(f"warning: {warning}"))
