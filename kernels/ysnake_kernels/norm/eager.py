"""Gated RMSNorm in pure torch, a block of rows at a time, its gradient written by hand.

A block's temporaries stay in the cache. Backward recomputes from the inputs.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable, empty_gradients, with_none, without_none
from ysnake_kernels.memory import as_base
from ysnake_kernels.numerics import accumulator

BLOCK_ELEMENTS = 128 * 1024  # of a temporary: half a megabyte in float32
# glibc before 2.38 fits no aligned block into the gap that one of its size has left; with a little
# more than is needed, the next layer's output goes where a norm was, instead of to new memory.
SLACK = 256


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Arguments as `rms_norm_gated` has checked them."""
    y = _differentiable(x, weight, bias, z, float(eps), group_size, norm_before_gate)
    return y.to(out_dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    y = _like(x)
    rows, gates, out = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, z, y))
    forward(rows, weight, bias, gates, out, eps, group_size, norm_before_gate)
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
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = (eps, group_size, norm_before_gate)
    return without_none((dx, *gradients(x, weight, bias, z, dy, dx, options)))


_norm = torch.library.custom_op("ysnake::norm_eager", _forward, mutates_args=())
_norm_backward = torch.library.custom_op("ysnake::norm_eager_backward", _backward, mutates_args=())


@_norm.register_fake
def _(x, weight, bias, z, eps, group_size, norm_before_gate):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_norm_backward.register_fake
def _(dy, x, weight, bias, z, eps, group_size, norm_before_gate):
    return empty_gradients(x, weight, bias, z)


def _save(ctx, inputs, output):
    x, weight, bias, z, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, z)


def _differentiate(ctx, backward, dy):
    grads = backward(dy, *ctx.saved_tensors, *ctx.options)
    return *with_none(grads, ctx.saved_tensors), None, None, None


_differentiable = Differentiable(_norm, _forward, _save, _differentiate, _norm_backward, _backward)


def gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    options: tuple,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Those of weight, bias and z, a block of rows at a time; writes dx, which may be dy."""
    acc = accumulator(x, weight, bias, z)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dw, db = torch.zeros_like(weight, dtype=acc), torch.zeros_like(weight, dtype=acc)
    for xb, zb, gb, dxb, dzb in _rows(x, z, dy, dx, dz):
        grad, dzs, _ = backward(xb, weight, bias, zb, gb, dw, db, *options)
        dxb.copy_(grad)
        if dzb is not None:
            dzb.copy_(dzs)
    return dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), dz


def _rows(*tensors: Tensor | None) -> list[list[Tensor | None]]:
    """The tensors as [rows features] views or copies, cut into the same blocks of rows."""
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors]
    rows, features = flat[0].shape
    size = max(1, BLOCK_ELEMENTS // features)
    spans = [slice(s, s + size) for s in range(0, rows, size)]
    return [[None if t is None else t[span] for t in flat] for span in spans]


def _like(x: Tensor) -> Tensor:
    memory = torch.empty(x.numel() + SLACK, dtype=x.dtype, device=x.device)
    return as_base(memory[: x.numel()].view(x.shape))


def unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x), [... 1]."""
    scale = rstd(x, eps)
    return torch.mul(x, scale, out=_like(x)), scale


def _unit(v: Tensor, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    """v / rms(v) and 1 / rms(v), by group: [... groups group_size] and [... groups 1]."""
    groups = v.unflatten(-1, (-1, group_size))
    scale = rstd(groups, eps)
    return groups * scale, scale


def rstd(v: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """1 / rms(v) over the last dimension, [... 1]."""
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True, out=out)
    return norm.square_().div_(v.shape[-1]).add_(eps).rsqrt_()


def unit_backward(dunit: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """The gradient of v, in place of that of unit = scale v, where `scale` is 1 / rms(v)."""
    along = torch.linalg.vecdot(dunit, unit)[..., None].div_(unit.shape[-1])
    return dunit.addcmul_(unit, along, value=-1).mul_(scale)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    y: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> None:
    """Writes y, a block of tokens at a time; x, z and y are [... tokens features]."""
    acc = accumulator(x, weight, bias, z)
    grouped = partial(torch.unflatten, dim=-1, sizes=(-1, group_size))
    weight, bias = (None if t is None else grouped(t.to(acc)) for t in (weight, bias))
    size = max(1, BLOCK_ELEMENTS * x.shape[-2] // max(1, x.numel()))
    xs, ys = (grouped(t).split(size, -3) for t in (x, y))
    zs = [None] * len(xs) if z is None else grouped(z).split(size, -3)
    for xb, zb, yb in zip(xs, zs, ys, strict=True):
        out = yb if yb.dtype == acc else torch.empty(yb.shape, dtype=acc, device=yb.device)
        v = xb.to(acc)
        gate = None if zb is None else F.silu(zb.to(acc))
        if gate is not None and not norm_before_gate:
            v = torch.mul(gate, v, out=out)
        torch.mul(v, rstd(v, eps), out=out).mul_(weight)
        if bias is not None:
            out += bias
        if gate is not None and norm_before_gate:
            out *= gate
        if out is not yb:
            yb.copy_(out)


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    dy: Tensor,
    dw: Tensor,
    db: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    want_y: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x and z of a block, and y if wanted; adds to dw and, with a bias, to db."""
    acc = accumulator(x, weight, bias, z)
    x, grad, w = x.to(acc), dy.to(acc), weight.to(acc)
    v = x
    if z is not None:
        z = z.to(acc)
        gate = F.silu(z)
        if not norm_before_gate:
            v = x * gate
    unit, scale = _unit(v, eps, group_size)
    flat = unit.flatten(-2)
    y = dz = None
    if want_y or (z is not None and norm_before_gate):
        y = flat * w if bias is None else torch.addcmul(bias.to(acc), flat, w)
        if z is not None and norm_before_gate:
            dz = torch.ops.aten.silu_backward(grad * y, z)
            grad, y = grad * gate, y.mul_(gate)
    every = tuple(range(x.ndim - 1))
    dw += (grad * flat).sum(every)
    if bias is not None:
        db += grad.sum(every)
    g = (grad * w).unflatten(-1, (-1, group_size))
    dv = unit_backward(g, unit, scale).flatten(-2)
    if z is None or norm_before_gate:
        return dv, dz, y
    dz = torch.ops.aten.silu_backward(x * dv, z)
    return dv.mul_(gate), dz, y
