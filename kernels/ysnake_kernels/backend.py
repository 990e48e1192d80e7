"""Which implementation of an operator runs, and how a user overrides it.

`fused` (Triton) runs for tensors on a CUDA or HIP device where Triton can be imported, `eager`
(pure torch) everywhere else, unless the environment variable YSNAKE_BACKEND or
`with backend(name):` asks for another. A forced implementation that cannot run is an error.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ysnake_kernels import preemption

NAMES = ("reference", "eager", "fused")

_override: ContextVar[str | None] = ContextVar("ysnake_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator called inside the `with` block by the implementation `name`.

    Raises ValueError if there is no such implementation. Nests; local to the thread and to the
    asynchronous task; stronger than YSNAKE_BACKEND.
    """
    token = _override.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


def as_chosen_here(function: Callable) -> Callable:
    """The function, run under the override that is in force now, whichever thread calls it.

    For what backward computes again: on a GPU it runs in a thread that knows of no override.
    """
    if torch.compiler.is_compiling():  # the compiler cannot look at the override
        return function
    name = _override.get()
    if name is None:
        return function

    def run(*arguments, **keywords):
        with backend(name):
            return function(*arguments, **keywords)

    return run


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def choose(tensor: Tensor) -> str:
    """The name of the implementation that runs for an operator on `tensor`'s device.

    What torch.compile has compiled keeps the implementation that was chosen then.

    Raises:
        RuntimeError: `fused` is forced where it cannot run.
    """
    return _choose(tensor.device)


def _choose(device: torch.device) -> str:
    on_gpu = device.type == "cuda"  # HIP devices too
    name = _override.get()
    if name is None and (forced := os.environ.get("YSNAKE_BACKEND")):
        name = _checked(forced, "YSNAKE_BACKEND")
    if name is None:
        if not on_gpu:
            preemption.watch.look()
        return "fused" if on_gpu and _has_triton() else "eager"
    if name == "fused":
        if not _has_triton():
            raise RuntimeError("backend 'fused': triton cannot be imported here")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"backend 'fused': needs a CUDA or HIP device, got {device}; "
                "TRITON_INTERPRET=1 runs it on a CPU, slowly"
            )
    return name


# As torch.compiler.assume_constant_result marks it, which would import the compiler, for seconds:
# _choose looks at the environment, which cannot be traced.
_choose._dynamo_marked_constant = True
