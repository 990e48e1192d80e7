"""Launches of Triton kernels that take little time on the host.

At every launch Triton works out for which kinds of arguments the kernel must be compiled. That
takes longer than many of our kernels run. A `Launcher` remembers the compiled kernel of each kind.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import accumulator
from ysnake_kernels.triton_math import ROUND_ONCE

INTERPRETED = triton.knobs.runtime.interpret


class Launcher:
    """A kernel together with its compile-time arguments and its launch options."""

    def __init__(self, kernel: Any, constants: Sequence[Any], options: dict[str, Any]):
        self.kernel = kernel
        self.constants = tuple(constants)
        self.options = options
        self.compiled: dict[tuple, Any] = {}

    def __call__(
        self, programs: tuple[int, ...], tensors: Sequence[Tensor | None], integers: Sequence[int]
    ) -> None:
        """Launch the kernel on the current device and stream.

        Args:
            programs: the grid, one to three numbers.
            tensors: the kernel's first arguments; the first of them is not None.
            integers: the arguments after the tensors. The constants follow them.
        """
        if INTERPRETED:
            self.kernel[programs](*tensors, *integers, *self.constants, **self.options)
            return
        # Triton compiles a kernel separately for other dtypes, for tensors whose address is not a
        # multiple of 16, and for integers that are 1, multiples of 16, or wider than 32 bits.
        first = tensors[0]
        assert first is not None
        key = (
            first.get_device(),
            *[None if t is None else (t.dtype, t.data_ptr() & 15 == 0) for t in tensors],
            *[2 if i == 1 else i & 15 == 0 for i in integers],
            max(integers) >= 2**31 and tuple(i >= 2**31 for i in integers),
        )
        compiled = self.compiled.get(key)
        if compiled is None:
            launch = self.kernel[programs]
            self.compiled[key] = launch(*tensors, *integers, *self.constants, **self.options)
        else:
            compiled[(*programs, 1, 1)](*tensors, *integers, *self.constants)


@cache
def launcher(
    kernel: Any, constants: tuple[Any, ...], num_warps: int = 4, num_stages: int = 3
) -> Launcher:
    """The launcher of a kernel with these compile-time arguments. Equal arguments share a launcher.

    Args:
        kernel: a function that triton.jit returned.
        constants: the arguments after the tensors and integers, in the kernel's order. A named
            tuple is one argument.
        num_warps, num_stages: Triton's launch options.
    """
    static = tuple(type(c)(*map(tl.constexpr, c)) if isinstance(c, tuple) else c for c in constants)
    options = {"num_warps": num_warps, "num_stages": num_stages, **ROUND_ONCE}
    return Launcher(kernel, static, options)


def triton_accumulator(*tensors: Tensor | None) -> tl.dtype:
    """`accumulator` as a dtype of Triton."""
    return tl.float64 if accumulator(*tensors) == torch.float64 else tl.float32


def contiguous(t: Tensor | None) -> Tensor | None:
    """The tensor with its elements side by side. None stays None."""
    return None if t is None else t.contiguous()
