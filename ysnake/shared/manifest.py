"""Hashes of the files in a folder, stored in the folder, to detect damaged files."""

import hashlib
import json
from pathlib import Path

from ysnake.shared.errors import InputError, why
from ysnake.shared.files import read_json

FILE = "manifest.json"  # SHA-256 of the files in the folder


def write(folder: Path) -> None:
    """Write the hashes of all files in a folder and below it into the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / FILE).write_text(json.dumps(hashes, indent=2) + "\n")


def verify(path: Path, folder: Path | None = None) -> None:
    """Compare a file with its stored hash. A folder that ysnake did not write has no hashes.

    Args:
        path: the file.
        folder: the folder with the hashes, if the file is not directly in it.

    Raises:
        InputError: the content differs from what was saved, or the file cannot be read.
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
            f"{path}: damaged or exchanged, its content does not match the hash in {manifest}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:  # for instance from a failing disk
        raise InputError(f"{path}: {why(error)}") from error
    return digest.hexdigest()
