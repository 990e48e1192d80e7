"""The fused SSD scan as PyTorch sees it: two custom operators, which torch.compile leaves alone,
and the autograd between them. What is saved for backward is the inputs.
"""

import torch
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd.fused_backward import backward
from ysnake_kernels.ssd.fused_forward import forward
from ysnake_kernels.ssd.fused_tiles import LARGEST

ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? initial_states, Tensor? dt_bias, Tensor? seq_idx, Tensor? cu_seqlens, "
    "bool softplus, float low, float high"
)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int | None,
    D: Tensor | None, z: Tensor | None, initial_states: Tensor | None, seq_idx: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as `ssd_scan` has checked them; the tile is the kernel's own, not `chunk_size`.

    Raises:
        ValueError: a head or state is larger than the kernels hold.
    """
    check_sizes(x.shape[3], B.shape[3])
    small = (A, D, initial_states, dt_bias, seq_idx, cu_seqlens)
    A, D, initial_states, dt_bias, seq_idx, cu_seqlens = (
        None if t is None else t.contiguous() for t in small
    )
    options = (bool(dt_softplus), *map(float, dt_limit))
    return _differentiable(
        x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens, *options
    )


def check_sizes(head_dim: int, state: int) -> None:
    """Raise ValueError where a head or its state is larger than the kernels hold."""
    for name, what, size in (("x", "head", head_dim), ("B", "state", state)):
        if size > LARGEST:
            raise ValueError(f"{name}: expected a {what} size of at most {LARGEST}, got {size}")


_scan = torch.library.custom_op(
    "ysnake::ssd_scan", forward, mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)"
)


@_scan.register_fake
def _(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens, *options):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    exact = accumulator(x, dt, A, B, C, D, z, initial_states, dt_bias)
    states = x.new_empty(sequences, *x.shape[2:], B.shape[3], dtype=exact)
    return x.new_empty(x.shape), states


@torch.library.custom_op(
    "ysnake::ssd_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dfinal, {ARGUMENTS}) -> Tensor[]",
)
def _scan_backward(dy, dfinal, *arguments):
    # An operator cannot return None: an empty tensor stands for an absent argument's gradient.
    return [dy.new_empty(0) if g is None else g for g in backward(dy, dfinal, *arguments)]


@_scan_backward.register_fake
def _(dy, dfinal, *arguments):
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in arguments[:9]]


def _save(ctx, inputs, output):
    *tensors, softplus, low, high = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.options = (softplus, low, high)


def _differentiate(ctx, backward, dy, dfinal):
    tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    grads = backward(dy, dfinal, *tensors, *ctx.options)
    present = [None if t is None else g for t, g in zip(tensors[:9], grads, strict=True)]
    return *present, None, None, None, None, None


_differentiable = Differentiable(_scan, forward, _save, _differentiate, _scan_backward, backward)
