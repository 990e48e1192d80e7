"""Compiling kernels.cpp on the machine that runs it, and loading the result.

This takes a few seconds once. The result is kept in a folder of the user, under a name that depends
on the code and on the processor. So it is compiled again when one of them has changed.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
# Without -ffinite-math-only, so that a NaN stays one.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
COMPILERS = ["g++", "c++", "clang++"]


class BuildError(Exception):
    """kernels.cpp cannot be compiled or loaded here. The message says why."""


class NoCompiler(BuildError):
    """The machine cannot compile. That is no fault, since pure torch does the same."""


@cache
def library() -> ctypes.CDLL:
    """The compiled code. It is compiled now if it is not there yet.

    Raises:
        NoCompiler: there is no compiler, or the system is not Linux.
        BuildError: the compiler fails, or the result cannot be loaded.
    """
    if platform.system() != "Linux":
        raise NoCompiler("compiled code is for Linux")
    path = location()
    if not _is_ours(path):
        _compile(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path}: {error}") from error


@cache
def ready() -> bool:
    """Whether the code can run without being compiled now. The first answer holds for the process.

    So an operator that asks this never compiles in a program that did not ask for it.
    """
    if not _is_compiled():
        return False
    try:
        library()
    except BuildError as error:
        warnings.warn(f"{error}. Delete this file. Until then pure torch runs.", stacklevel=2)
        return False
    return True


def must_compile() -> bool:
    """Whether `library` would compile now."""
    linux = platform.system() == "Linux"
    return linux and not _is_compiled() and _compiler() is not None


def _is_compiled() -> bool:
    """Whether `library` finds the code compiled."""
    try:
        return platform.system() == "Linux" and _is_ours(location())
    except BuildError:  # `library` raises it
        return False


def location() -> Path:
    """Where the compiled code is kept. Another code or another processor has another path.

    Raises:
        BuildError: the system does not say which processor it has, or where the user's folder is.
    """
    key = hashlib.sha256()
    try:
        for part in (SOURCE.read_bytes(), " ".join(FLAGS).encode(), _processor().encode()):
            key.update(hashlib.sha256(part).digest())
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (OSError, RuntimeError) as error:
        raise BuildError(str(error)) from error
    return Path(root, "ysnake", "native", f"{key.hexdigest()[:24]}.so")


def _processor() -> str:
    """What distinguishes processors for which -march=native gives other code."""
    names = ("model name", "flags", "Features", "CPU part")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _is_ours(path: Path) -> bool:
    """Whether the file is there, and nobody but this user can have written it."""
    try:
        found = [path.stat(), path.parent.stat()]
    except OSError:
        return False
    return all(each.st_uid == os.getuid() and not each.st_mode & 0o022 for each in found)


def _compilers() -> list[str]:
    """Names of the compilers that are tried."""
    own = os.environ.get("CXX")
    return [own] if own else COMPILERS


def _compiler() -> str | None:
    """The path of the first compiler that is installed."""
    return next(filter(None, map(shutil.which, _compilers())), None)


def _compile(path: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise NoCompiler(f"no C++ compiler ({', '.join(_compilers())}) is installed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise BuildError(f"cannot write to {path.parent}: {error.strerror}") from error
    with folder:
        new = Path(folder.name, path.name)
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.splitlines() or ["no message"]
            why = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{compiler} failed: {why}")
        new.chmod(0o700)
        new.replace(path)
