"""Settings of the memory allocator that torch uses on a CPU, made from inside the program."""

import ctypes
import platform
from functools import cache
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


def keep_freed_memory(largest: int = 1 << 30) -> None:
    """Let the C library keep freed memory for later, instead of giving it back to the system.

    A training step asks for the same blocks again and again. When the system maps memory anew, it
    first clears it page by page. With this the process keeps its peak memory until it ends.

    All threads use one arena. With arenas of their own, the threads of a matrix product would keep
    memory too: up to a tenth more, in some runs and not in others.

    This does nothing where the C library is not glibc.

    Args:
        largest: the size in bytes up to which freed blocks are kept. Larger blocks may be mapped
            anew. That takes time, but leaves no gaps that later blocks do not fit.
    """
    if not _is_glibc():
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # as in malloc.h
    libc = ctypes.CDLL(None)
    # glibc before 2.35 refuses more than 32 MB here
    libc.mallopt(M_MMAP_THRESHOLD, largest) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(M_ARENA_MAX, 1)


@cache  # there is one hook, however often this is called
def keep_freed_memory_once_training() -> None:
    """Call `keep_freed_memory` after the first step of any optimizer of torch in this process.

    A program that only reads and generates keeps the allocator as it is.
    """
    set_once = cache(keep_freed_memory)

    def trained(*of_step: Any) -> None:
        set_once()

    register_optimizer_step_post_hook(trained)  # it stays: torch cannot remove a hook while it runs


def give_back_freed_memory() -> None:
    """Give all freed memory back to the system, once.

    For the moment after a large conversion, such as that of a model's weights to fewer bits.
    Otherwise `keep_freed_memory` would keep the old weights' memory until the process ends.

    This does nothing where the C library is not glibc.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
