"""Compiling kernels.cpp on the machine that runs it, and loading the result.

This takes a few seconds once. The result is kept in ~/.cache/ysnake/native. Its name changes with
the code, the flags and the processor, so it is compiled again when one of them has changed.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
PARTS = [SOURCE, SOURCE.with_name("products.hpp")]
# Without -ffinite-math-only, so that a NaN stays one.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
PER_THREAD = 1 << 16  # fewest weights or state elements for which a thread is worth its cost
COMPILERS = ["g++", "c++", "clang++"]


class BuildError(Exception):
    """kernels.cpp cannot be compiled or loaded here. The message says why."""


class NoCompiler(BuildError):
    """The machine has no C++ compiler, or its system is not Linux."""


@cache
def library() -> ctypes.CDLL:
    """The compiled code. It is compiled now if it is not there yet.

    Raises:
        NoCompiler: there is no compiler, or the system is not Linux.
        BuildError: the compiler fails, or the result cannot be kept or loaded.
    """
    if platform.system() != "Linux":
        raise NoCompiler("compiled code is for Linux only")
    path = location()
    if (kept := _kept(path)) is not None:
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)  # nobody else may put a file there
        _compile(path)
    except OSError as error:
        message = f"compiled code cannot be kept in {path.parent} ({error.strerror})"
        raise BuildError(f"{message}; XDG_CACHE_HOME names another folder") from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"compiled code cannot be loaded ({error})") from error


def threads_for(numbers: int) -> int:
    """How many threads to use for this number of weights or state elements."""
    return min(torch.get_num_threads(), max(1, numbers // PER_THREAD))


@cache
def ready() -> bool:
    """Whether the code can run without being compiled now. The first answer holds for the process.

    So an operator that asks this never compiles in a program that did not ask for it.
    """
    try:
        return platform.system() == "Linux" and _kept(location()) is not None
    except BuildError:  # `library` raises it
        return False


def would_compile() -> bool:
    """Whether `library` would compile now."""
    try:
        linux = platform.system() == "Linux"
        return linux and _kept(location()) is None and _compiler() is not None
    except BuildError:  # `library` raises it
        return False


def location() -> Path:
    """Where the compiled code is kept.

    Raises:
        BuildError: the system does not say which processor it has, or where the user's folder is.
    """
    key = hashlib.sha256()
    try:
        texts = [path.read_bytes() for path in PARTS]
        for part in (*texts, " ".join(FLAGS).encode(), _processor().encode()):
            key.update(hashlib.sha256(part).digest())
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (OSError, RuntimeError) as error:
        raise BuildError(str(error)) from error
    return Path(root, "ysnake", "native", f"{key.hexdigest()[:24]}.so")


def _kept(path: Path) -> ctypes.CDLL | None:
    """The code that was compiled before. None if there is none, or if it is damaged."""
    if not _is_ours(path):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _processor() -> str:
    """The lines of /proc/cpuinfo that decide what -march=native compiles."""
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


def _compiler() -> list[str] | None:
    """The command that compiles, with the options that CXX gives it. None if there is none.

    Raises:
        BuildError: CXX names a compiler that is not installed.
    """
    if own := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(own[0]) is None:
            raise BuildError(f"CXX names {own[0]}, which is not installed")
        return own
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def _compile(path: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise NoCompiler(f"no C++ compiler is installed (looked for {', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder, path.name)
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.splitlines() or ["no message"]
            telling = (line for line in lines if "error:" in line or "failed" in line)
            raise BuildError(f"{compiler[0]} failed: {next(telling, lines[-1])}")
        new.chmod(0o700)
        new.replace(path)
