"""Which implementation of an operator runs, and how a user overrides it.

`fused` (Triton) runs for tensors on a CUDA or HIP device if Triton can be imported. `eager` (pure
torch) runs everywhere else. The environment variable YSNAKE_BACKEND or `with backend(name):` forces
another. A forced implementation that cannot run is an error.
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
    """Use the implementation `name` for every operator that the `with` block calls.

    It holds for this thread, or this asynchronous task, only. It overrides YSNAKE_BACKEND and any
    outer block.

    Args:
        name: "reference", "eager" or "fused".

    Raises:
        ValueError: there is no such implementation.
    """
    token = _override.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


def as_chosen_here(function: Callable) -> Callable:
    """The function, bound to the override that holds now, whichever thread calls it later.

    Backward needs this where it computes something again: on a GPU it runs in a thread of its own,
    where the override does not hold.
    """
    if torch.compiler.is_compiling():  # the compiler cannot trace the override
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

    A function that torch.compile has compiled keeps the implementation chosen at compile time.

    Raises:
        RuntimeError: `fused` is forced where it cannot run.
        ValueError: YSNAKE_BACKEND is not the name of an implementation.
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


# torch.compile cannot trace a look at the environment. This is the mark that
# torch.compiler.assume_constant_result sets; calling it would import the compiler, for seconds.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
