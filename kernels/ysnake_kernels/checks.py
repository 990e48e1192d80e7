"""Checks of arguments that the operators share. Every error names the argument."""

import os

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    match: str = "x",
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Raise unless `tensor` has this shape, one of these dtypes, and the device of `like`.

    `match` is the argument that the error names as the one to match.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape} to match {match}, got {tuple(tensor.shape)}"
        )
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected one of {expected}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} to match {match}, got {tensor.device}"
        )


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raise unless `tensor` is a floating-point tensor with as many dimensions as `axes` names."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.ndim != len(axes.rstrip(",").split(", ")):
        raise ValueError(f"{name}: expected shape ({axes}), got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_whole(name: str, value: int | None) -> None:
    """Raise unless `value` is None or a whole number of at least 1."""
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_skip(D: Tensor | None, heads: int, head_dim: int, x: Tensor) -> None:
    """Raise unless D is None, or has a value per head or per channel."""
    if D is not None:
        by_channel = isinstance(D, Tensor) and D.ndim == 2
        check("D", D, (heads, head_dim) if by_channel else (heads,), x)


def check_limit(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The two limits as floats. Raise unless `dt_limit` is a range of step sizes."""
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2:
        raise ValueError(f"dt_limit: expected two numbers, got {dt_limit!r}")
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ValueError(f"dt_limit: expected 0 <= low <= high, got {dt_limit}")
    return float(low), float(high)


def values_can_be_checked(tensor: Tensor) -> bool:
    """Whether the values may be looked at.

    They may on a CPU outside torch.compile, where it is cheap. On a GPU it would wait for the
    device, so it is done only if the environment variable YSNAKE_CHECK is 1. Subclasses of tensors,
    such as fake ones, may have no values.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter):
        return False
    return tensor.device.type == "cpu" or os.environ.get("YSNAKE_CHECK") == "1"


def check_decay(A: Tensor) -> None:
    """Raise if some A > 0: the state would grow without bound."""
    if values_can_be_checked(A) and bool((A > 0).any()):
        raise ValueError(f"A: expected values <= 0, got a maximum of {A.max().item():g}")


def check_seq_idx(seq_idx: Tensor) -> None:
    """Raise if document numbers go down along the sequence."""
    if values_can_be_checked(seq_idx) and bool((seq_idx[:, 1:] < seq_idx[:, :-1]).any()):
        raise ValueError("seq_idx: expected document numbers that never decrease along the length")


def check_indices(name: str, indices: Tensor, x: Tensor, rows: int) -> None:
    """Raise unless `indices` gives each row of x its own row of a state with `rows` rows, or -1."""
    check(name, indices, (x.shape[0],), x, dtypes=INTEGERS)
    if not values_can_be_checked(indices):
        return
    if bool((indices < -1).any()) or bool((indices >= rows).any()):
        expected = f"rows from 0 to {rows - 1}, or -1 for padding"
        raise ValueError(f"{name}: expected {expected}, got {indices.tolist()}")
    used = indices[indices >= 0]
    if len(used.unique()) < len(used):
        raise ValueError(f"{name}: expected no row twice, got {indices.tolist()}")
