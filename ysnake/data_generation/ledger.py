"""The ledger of a corpus: each question, what became of the answer, and where it is on disk.

It is a hidden file beside the documents. With it a process that was stopped or killed continues
where it stopped. A line is written before its document, and the end of the line after it. So a line
with an end stands for a whole document.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from ysnake.shared.errors import InputError, why
from ysnake.shared.run_lock import try_lock, warn_of_no_locks
from ysnake.text.prose import DUPLICATE, NEAR_DUPLICATE

KEPT, REFUSAL, STUB = "kept", "refusal", "stub"  # verdicts
DROPPED = (REFUSAL, STUB, DUPLICATE, NEAR_DUPLICATE)
DAMAGE = (ValueError, LookupError, TypeError, RecursionError)  # of lines of another hand


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
    """Lock a file for this process until the process ends. Warns on a file system without locks."""
    free = try_lock(file.fileno())
    if free is None:
        warn_of_no_locks(path.parent)
    elif not free:
        raise InputError(f"{path}: another process is writing it")


def recover(file: BinaryIO, ledger: BinaryIO, path: Path) -> list[dict[str, Any]]:
    """Cut off what a killed process wrote in part: a line without an end, and its document.

    If only the end of the line is missing, it is added. Returns the records of the ledger.

    Raises:
        InputError: something else has changed the ledger or the file. Both stay unchanged.
    """
    ledger.seek(0)
    *whole, torn = ledger.read().split(b"\n")
    try:
        records = [json.loads(line) for line in whole]
        end = documents_end(records)
    except DAMAGE as error:
        raise InputError(f"{path}: {ledger.name}, the list of its questions, is damaged") from error
    try:
        last = json.loads(torn)
        most = documents_end([last], end)
    except DAMAGE:
        last, most = None, end  # not even the line is whole, so its document was not begun
    size = file.seek(0, os.SEEK_END)
    if not end <= size <= most:
        raise InputError(
            f"{path}: expected {end} bytes, as last written by this command, got {size}; "
            "to leave it as it is, give another --out"
        )
    if last is not None and size == most:
        append(ledger, b"\n", path)
        return [*records, last]
    if torn:
        file.truncate(end)
        ledger.truncate(sum(len(line) + 1 for line in whole))
    return records


def documents_end(records: list[Any], start: int = 0) -> int:
    """Where the last document of these records ends in the file. The first begins at `start`.

    Raises:
        ValueError, LookupError, TypeError: this command did not write these records.
    """
    end = start
    for record in records:
        entry, prompt, verdict = record["entry"], record["prompt"], record["verdict"]
        if not isinstance(entry, str) or type(prompt) is not int:
            raise TypeError("an entry or a prompt of another kind")
        if verdict == KEPT:
            at, size = record["at"], record["bytes"]
            if type(at) is not int or type(size) is not int or at != end or size <= 0:
                raise ValueError("a document that does not follow the one before it")
            end += size
        elif verdict not in DROPPED:
            raise ValueError("a verdict that is not known")
    return end
