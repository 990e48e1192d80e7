"""The memory allocator under torch on a CPU, set from inside the program."""

import ctypes
import platform


def keep_freed_memory(largest: int = 1 << 30) -> None:
    """Have the C library keep what is freed for the next step, instead of giving it back.

    A training step asks for the same memory again and again; memory that is mapped anew has to be
    cleared by the system first, page by page. The process keeps the memory of its highest point.
    What the threads of a matrix product ask for comes from the same place: in arenas of their own,
    which would be kept too, it added up to a tenth, in one run and not in the next. Does nothing
    where the C library is not glibc.

    Args:
        largest: bytes of a block that is kept; larger ones may be mapped anew, which takes time
            but leaves no gaps that later ones do not fit.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
    libc = ctypes.CDLL(None)
    # glibc before 2.35 refuses more than 32 MB here
    libc.mallopt(M_MMAP_THRESHOLD, largest) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(M_ARENA_MAX, 1)
