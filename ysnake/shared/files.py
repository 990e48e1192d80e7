"""Writing a file completely or not at all, moving folders, and reading JSON with clear errors."""

import errno
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ysnake.shared.errors import InputError, why

LARGEST_JSON = 1 << 26  # bytes
WINDOWS = os.name == "nt"
PATIENCE, POLL = 30.0, 0.1  # seconds that `patiently` tries, and waits between two tries

Result = TypeVar("Result")


def check_place(path: Path, field: str) -> None:
    """Raise InputError for the option `field` if `path` names no file, or has no folder."""
    if not path.name:  # "." or "/"
        raise InputError(f"expected a file to write, got {path}", field=field)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; make it first", field=field)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, empty file beside `path`. It replaces `path` when the block ends.

    If the block fails, `path` stays unchanged. If `path` is a link, the link is replaced and its
    target stays unchanged.

    Raises:
        InputError: the file cannot be written. The message names it.
    """
    if not path.name:  # "." or "/"
        raise InputError(f"{path}: expected a file to write, found a folder")
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        if path.exists() and not path.is_symlink() and not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a device or a pipe"
            raise InputError(f"{path}: expected a file to write, found {kind}")
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield new
            with new.open("rb+") as file:
                os.fsync(file.fileno())
            patiently(lambda: new.replace(path))
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise
    except OSError as error:
        raise InputError(f"{path}: {why(error)}") from error


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder. A folder at `target` is removed first."""

    def move() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if WINDOWS and target.exists():  # a file in it is open
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        source.rename(target)

    patiently(move)


def patiently(change: Callable[[], Result]) -> Result:
    """Change a file or folder, on Windows again and again for PATIENCE seconds.

    Windows refuses while another program, such as a virus scanner, has a file in it open.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return change()
        except PermissionError:
            if not WINDOWS or time.monotonic() >= until:
                raise
        time.sleep(POLL)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder.

    No other process may be writing in the folder.
    """
    for path in folder.glob("*.????????.new"):
        if path.is_file():
            path.unlink()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file is missing, cannot be read, or is not JSON. The message names it.
    """
    if not path.is_file():  # reading a pipe, for instance, might never end
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path}: expected at most {LARGEST_JSON:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: {why(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
