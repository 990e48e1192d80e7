"""Hashes of the files in a folder, kept beside them, so that a damaged file is noticed."""

import hashlib
import json
from pathlib import Path

from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json

FILE = "manifest.json"  # SHA-256 of every file of the folder


def write(folder: Path) -> None:
    """Write the hashes of all files in a folder and below it into the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / FILE).write_text(json.dumps(hashes, indent=2) + "\n")


def verify(path: Path, folder: Path | None = None) -> None:
    """Compare a file with the hash in its folder; a folder of others has none.

    Args:
        path: the file.
        folder: where the hashes are, if not beside the file.

    Raises:
        InputError: it is not the file that was saved there, or cannot be read.
    """
    folder = folder or path.parent
    manifest = folder / FILE
    if not manifest.is_file():
        return
    saved = read_json(manifest)
    if not isinstance(saved, dict):
        raise InputError(f"{manifest}: damaged (expected an object)")
    name = path.relative_to(folder).as_posix()
    if name in saved and saved[name] != _sha256(path):
        raise InputError(
            f"{path}: damaged or exchanged, it is not the file that was saved here "
            f"(as {FILE} beside it says)"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:  # of a disk that fails, for instance
        raise InputError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()
