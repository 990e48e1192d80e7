"""The fused SSD scan as PyTorch sees it: two custom operators, which torch.compile leaves alone,
and the autograd between them. What is saved for backward is the inputs.
"""

import torch
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable, empty_gradients, with_none, without_none
from ysnake_kernels.ssd.fused_backward import backward
from ysnake_kernels.ssd.fused_forward import forward
from ysnake_kernels.ssd.fused_plan import LARGEST
from ysnake_kernels.ssd.inputs import DIFFERENTIABLE, SCHEMA, TENSORS, ScanInputs


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y and the final states, of inputs that `ssd_scan` has checked; chunk_size has no effect.

    Raises:
        ValueError: a head or state is larger than the kernels hold.
    """
    check_sizes(inputs.x.shape[3], inputs.B.shape[3])
    x, dt, A, B, C, D, z, *small = inputs[:TENSORS]
    D, *small = (None if t is None else t.contiguous() for t in (D, *small))
    return _differentiable(x, dt, A.contiguous(), B, C, D, z, *small, *inputs[TENSORS:])


def check_sizes(head_dim: int, state: int) -> None:
    """Raise ValueError where a head or its state is larger than the kernels hold."""
    for name, what, size in (("x", "head", head_dim), ("B", "state", state)):
        if size > LARGEST:
            raise ValueError(f"{name}: expected a {what} size of at most {LARGEST}, got {size}")


def _forward(*arguments):
    return forward(ScanInputs(*arguments))


def _backward(dy, dfinal, *arguments):
    return backward(dy, dfinal, ScanInputs(*arguments))


_scan = torch.library.custom_op(
    "ysnake::ssd_scan", _forward, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)


@_scan.register_fake
def _(*arguments):
    inputs = ScanInputs(*arguments)
    return inputs.x.new_empty(inputs.x.shape), inputs.empty_states()


@torch.library.custom_op(
    "ysnake::ssd_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dfinal, {SCHEMA}) -> Tensor[]",
)
def _scan_backward(dy, dfinal, *arguments):
    return without_none(_backward(dy, dfinal, *arguments))


@_scan_backward.register_fake
def _(dy, dfinal, *arguments):
    return empty_gradients(*arguments[:DIFFERENTIABLE])


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _differentiate(ctx, backward, dy, dfinal):
    tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    grads = backward(dy, dfinal, *tensors, *ctx.options)
    present = with_none(grads, tensors[:DIFFERENTIABLE])
    return *present, None, None, *[None] * len(ctx.options)


_differentiable = Differentiable(_scan, _forward, _save, _differentiate, _scan_backward, _backward)
