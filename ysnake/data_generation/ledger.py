"""The ledger of a corpus: what was asked, what became of each answer, and where it lies on disk.

It is hidden beside the file of documents. So a process that was stopped or killed is taken up where
it was.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from ysnake.shared.errors import InputError

KEPT = "kept"
DROPPED = ("refusal", "stub", "duplicate", "near duplicate")


def append(file: BinaryIO, data: bytes, path: Path) -> None:
    """Add bytes to the end of an unbuffered file and wait for the disk; all of them or none.

    Raises:
        InputError: the disk is full or fails.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(end)
        raise InputError(f"{path}: {error.strerror}") from error


def lock(file: BinaryIO, path: Path) -> None:
    """Hold a file for this process alone, until the process ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it") from None


def recover(file: BinaryIO, ledger: BinaryIO, path: Path) -> list[dict[str, Any]]:
    """Cut off what a killed process left half-written; returns the lines of the ledger.

    Raises:
        InputError: the ledger or the file is of another hand. Both stay as they are.
    """
    ledger.seek(0)
    *whole, torn = ledger.read().split(b"\n")
    try:
        records = [json.loads(line) for line in whole]
        ends = document_ends(records)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: what was asked, in {ledger.name}, is damaged") from error
    size, end = file.seek(0, os.SEEK_END), ends[-1]
    if records and records[-1]["verdict"] == KEPT and ends[-2] <= size < end:
        file.truncate(ends[-2])
        ledger.truncate(sum(len(line) + 1 for line in whole[:-1]))
        return records[:-1]
    if size != end:
        raise InputError(
            f"{path}: expected {end} bytes, as last written by this command, got {size}; "
            "to leave it as it is, give another --out"
        )
    if torn:
        ledger.truncate(sum(len(line) + 1 for line in whole))
    return records


def document_ends(records: list[Any]) -> list[int]:
    """Where the file ends before the first answer of a ledger, and after each.

    Raises:
        ValueError, LookupError, TypeError: this command did not write these records.
    """
    ends = [0]
    for record in records:
        entry, prompt, verdict = record["entry"], record["prompt"], record["verdict"]
        if not isinstance(entry, str) or type(prompt) is not int:
            raise TypeError("an entry or a prompt of another kind")
        size = 0
        if verdict == KEPT:
            at, size = record["at"], record["bytes"]
            if type(at) is not int or type(size) is not int or at != ends[-1] or size <= 0:
                raise ValueError("a document that does not follow the one before it")
        elif verdict not in DROPPED:
            raise ValueError("a verdict that is not known")
        ends.append(ends[-1] + size)
    return ends
