"""Gated RMSNorm in pure torch, with its gradient written by hand.

Tensors are taken a block of rows at a time, so that the temporaries of a block stay in the cache.
Backward computes what it needs from the inputs again. The mixer and the linear layers call the
plain functions below the operator.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable, empty_gradients, with_none, without_none
from ysnake_kernels.memory import as_base
from ysnake_kernels.norm.inputs import NormInputs
from ysnake_kernels.numerics import accumulator

BLOCK_ELEMENTS = 128 * 1024  # of a temporary: half a megabyte in float32
# Spare elements after an output. glibc before 2.38 does not put an aligned block into a free gap of
# exactly its size. With them, the output of the next layer fits into the gap that a norm left.
SLACK = 256


def norm(inputs: NormInputs, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm_gated` of inputs that it has checked."""
    return _differentiable(*inputs, out_dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    y = _like(x, out_dtype)
    options = eps, group_size, norm_before_gate
    gates = None if z is None else _rows(z)
    forward(NormInputs(_rows(x), weight, bias, gates, *options), _rows(y))
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> list[Tensor]:
    options = eps, group_size, norm_before_gate
    acc = accumulator(x, weight, bias, z)
    dweight, dbias = torch.zeros_like(weight, dtype=acc), torch.zeros_like(weight, dtype=acc)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    xs, dys, dxs = _rows(x), _rows(dy), _rows(dx)
    zs, dzs = (None if t is None else _rows(t) for t in (z, dz))
    rows, features = xs.shape
    size = max(1, BLOCK_ELEMENTS // features)
    for start in range(0, rows, size):
        span = slice(start, start + size)
        block = NormInputs(xs[span], weight, bias, None if zs is None else zs[span], *options)
        dxs[span], dz_block, _ = backward(block, dys[span], dweight, dbias)
        if dzs is not None and dz_block is not None:
            dzs[span] = dz_block
    given = None if bias is None else dbias.to(bias.dtype)
    return without_none((dx, dweight.to(weight.dtype), given, dz))


_norm = torch.library.custom_op("ysnake::norm_eager", _forward, mutates_args=())
_norm_backward = torch.library.custom_op("ysnake::norm_eager_backward", _backward, mutates_args=())


@_norm.register_fake
def _(x, weight, bias, z, eps, group_size, norm_before_gate, out_dtype):
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


@_norm_backward.register_fake
def _(dy, x, weight, bias, z, eps, group_size, norm_before_gate):
    return empty_gradients(x, weight, bias, z)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, z, *ctx.options, _ = inputs
    ctx.save_for_backward(x, weight, bias, z)


def _differentiate(ctx: Any, backward: Callable, dy: Tensor) -> tuple:
    saved = ctx.saved_tensors  # read once: torch's checkpoint allows no second time
    grads = backward(dy, *saved, *ctx.options)
    return *with_none(grads, saved), None, None, None, None


_differentiable = Differentiable(_norm, _forward, _save, _differentiate, _norm_backward, _backward)


def _rows(t: Tensor) -> Tensor:
    """[rows features], a view where the strides allow."""
    return t.reshape(-1, t.shape[-1])


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the shape of x, with SLACK elements of memory after it."""
    memory = torch.empty(x.numel() + SLACK, dtype=dtype, device=x.device)
    return as_base(memory[: x.numel()].view(x.shape))


def rstd(v: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """1 / rms(v) over the last dimension, [... 1]."""
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True, out=out)
    return norm.square_().div_(v.shape[-1]).add_(eps).rsqrt_()


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x), [... 1]."""
    scale = rstd(x, eps)
    return torch.mul(x, scale, out=_like(x, x.dtype)), scale


def _normalise_groups(v: Tensor, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    """v / rms(v) and 1 / rms(v), by group: [... groups group_size] and [... groups 1]."""
    groups = v.unflatten(-1, (-1, group_size))
    scale = rstd(groups, eps)
    return groups * scale, scale


def normalise_backward(dy: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient of v from that of y = scale v, where `scale` is 1 / rms(v).

    It is written over `dy`.
    """
    along = torch.linalg.vecdot(dy, y)[..., None].div_(y.shape[-1])
    return dy.addcmul_(y, along, value=-1).mul_(scale)


def rms_norm_few_rows(x: Tensor, weight: Tensor, eps: Tensor, groups: int = 1) -> Tensor:
    """`rms_norm_gated` without bias and gate for a few rows, in five operations.

    When a model decodes token by token, calls take longer than their arithmetic.

    Args:
        x: (rows, features), contiguous.
        weight: (features,).
        eps: added to the mean square; a tensor of no dimensions in x's dtype.
        groups: of features, each with a mean of its own.
    """
    t = x.view(x.shape[0], groups, x.shape[1] // groups)
    length = torch.linalg.vector_norm(t, dim=2, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / t.shape[2]).rsqrt_()
    return torch.mul(t, scale).view(x.shape).mul_(weight)


def forward(inputs: NormInputs, y: Tensor) -> None:
    """Write the result to y, a block of tokens at a time; x, z and y are [... tokens features]."""
    x, weight, bias, z, eps, group_size, norm_before_gate = inputs
    acc = accumulator(x, weight, bias, z)
    grouped = partial(torch.unflatten, dim=-1, sizes=(-1, group_size))
    scale, shift = grouped(weight.to(acc)), None if bias is None else grouped(bias.to(acc))
    size = max(1, BLOCK_ELEMENTS * x.shape[-2] // max(1, x.numel()))
    xs, ys = (grouped(t).split(size, -3) for t in (x, y))
    zs = [None] * len(xs) if z is None else grouped(z).split(size, -3)
    for xb, zb, yb in zip(xs, zs, ys, strict=True):
        out = yb if yb.dtype == acc else torch.empty(yb.shape, dtype=acc, device=yb.device)
        v = xb.to(acc)
        gate = None if zb is None else F.silu(zb.to(acc))
        if gate is not None and not norm_before_gate:
            v = torch.mul(gate, v, out=out)
        torch.mul(v, rstd(v, eps), out=out).mul_(scale)
        if shift is not None:
            out += shift
        if gate is not None and norm_before_gate:
            out *= gate
        if out is not yb:
            yb.copy_(out)


def backward(
    inputs: NormInputs, dy: Tensor, dweight: Tensor, dbias: Tensor | None, want_y: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x and z of a block, and y if wanted.

    Adds those of the parameters to dweight and, if there is a bias, to dbias.
    """
    x, weight, bias, z, eps, group_size, norm_before_gate = inputs
    acc = accumulator(*inputs.tensors)
    x, grad, weight = x.to(acc), dy.to(acc), weight.to(acc)
    v, gate = x, None
    if z is not None:
        z = z.to(acc)
        gate = F.silu(z)
        if not norm_before_gate:
            v = x * gate
    normalised, scale = _normalise_groups(v, eps, group_size)
    flat = normalised.flatten(-2)
    y = dz = None
    if want_y or (gate is not None and norm_before_gate):
        y = flat * weight if bias is None else torch.addcmul(bias.to(acc), flat, weight)
        if gate is not None and norm_before_gate:
            dz = torch.ops.aten.silu_backward(grad * y, z)
            grad, y = grad * gate, y.mul_(gate)
    every = tuple(range(x.ndim - 1))
    dweight += (grad * flat).sum(every)
    if bias is not None and dbias is not None:
        dbias += grad.sum(every)
    dnormalised = (grad * weight).unflatten(-1, (-1, group_size))
    dv = normalise_backward(dnormalised, normalised, scale).flatten(-2)
    if gate is None or norm_before_gate:
        return dv, dz, y
    dz = torch.ops.aten.silu_backward(x * dv, z)
    return dv.mul_(gate), dz, y
