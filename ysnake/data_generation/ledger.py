"""The ledger of a corpus: each question, what became of the answer, and where it is on disk.

It is a hidden file beside the documents. With it a process that was stopped or killed continues
where it stopped.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from ysnake.shared.errors import InputError, why
from ysnake.shared.run_lock import try_lock

KEPT = "kept"
DROPPED = ("refusal", "stub", "duplicate", "near duplicate")


def append(file: BinaryIO, data: bytes, path: Path) -> None:
    """Append all bytes or none to an unbuffered file, and wait for the disk.

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
        raise InputError(f"{path}: {why(error)}") from error


def lock(file: BinaryIO, path: Path) -> None:
    """Lock a file for this process until the process ends."""
    if try_lock(file.fileno()) is False:
        raise InputError(f"{path}: another process is writing it")


def recover(file: BinaryIO, ledger: BinaryIO, path: Path) -> list[dict[str, Any]]:
    """Cut off what a killed process wrote incompletely. Returns the records of the ledger.

    Raises:
        InputError: something else has changed the ledger or the file. Both stay unchanged.
    """
    ledger.seek(0)
    *whole, torn = ledger.read().split(b"\n")
    try:
        records = [json.loads(line) for line in whole]
        ends = document_ends(records)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {ledger.name}, the list of its questions, is damaged") from error
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
    """The size of the file before the first answer in the ledger, and after each answer.

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
