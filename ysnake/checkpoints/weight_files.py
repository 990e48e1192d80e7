"""Reading foreign files of weights safely: they run no code, and do not grow in memory."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ysnake.shared import manifest
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json

HEADER = 1 << 22  # largest list of weights in a safetensors file, in bytes
Shapes = dict[str, tuple[int, ...]]


def list_shards(path: Path) -> list[str]:
    """The files that an index of weights lists. All must be beside it."""
    try:
        names = sorted(set(read_json(path)["weight_map"].values()))
        beside = all(Path(name).name == name and name not in ("", "..") for name in names)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error})") from error
    if not beside:
        raise InputError(f"{path}: expected names of files beside it, got {', '.join(names)[:200]}")
    return names


def read_shapes(path: Path) -> Shapes:
    """The shapes of the tensors in a safetensors file, without reading the tensors."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > HEADER:
            raise InputError(f"{path}: damaged (a list of weights of {length:,} bytes)")
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:  # the file is mapped
        raise InputError(f"{path}: damaged ({error})") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Copies of the tensors. With mapped tensors, truncating the file would kill the process."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:  # torch maps the file
        raise InputError(f"{path}: damaged ({error})") from error


def read_pickled(path: Path) -> Any:
    """Read what torch.save wrote. Nothing can run code or become larger than the file."""
    manifest.verify(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size:  # torch compresses nothing
                raise InputError(f"{path}: damaged (content of {size:,} bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: damaged ({type(error).__name__})") from error


def check_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """Check the content of a pickled file: tensors by name, at most twice the file's size."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{path}: expected tensors by name")
    if not all(map(torch.is_tensor, content.values())):
        raise InputError(f"{path}: expected tensors by name")
    size = sum(t.numel() * t.itemsize for t in content.values())
    if size > 2 * path.stat().st_size:  # twice, since a tied head may be stored again
        raise InputError(f"{path}: damaged (tensors of {size:,} bytes)")
    return content
