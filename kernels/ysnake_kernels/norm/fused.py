"""Gated RMSNorm in Triton: one kernel forward and one backward, each reading its inputs once.

A program owns a block of rows of one group of features. Backward recomputes from the inputs and
sums the gradients of weight and bias over a program's rows in registers; torch adds the programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable
from ysnake_kernels.numerics import accumulator, ceil_divide, common_unit, next_power_of_2
from ysnake_kernels.triton_launch import Launcher, launcher

MAX_GROUP = 16384  # features that a program holds in registers
TILE = 2048  # elements that a program works on at once, if a group is not larger
FORWARD_PER_THREAD, BACKWARD_PER_THREAD = 16, 8  # elements; more spill
PROGRAMS = 512  # of the backward, at most: its partial sums, and a few for every multiprocessor


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """Arguments as `rms_norm_gated` has checked them.

    Raises:
        ValueError: a group does not fit the registers of a multiprocessor.
    """
    if group_size > MAX_GROUP:
        raise ValueError(
            f"group_size: expected at most {MAX_GROUP} with backend 'fused', got {group_size}"
        )
    return _differentiable(x, weight, bias, z, eps, group_size, norm_before_gate)


@triton.jit
def _load(pointer, row, row_stride, feature, inside, UNIT: tl.constexpr, ACC: tl.constexpr):
    offsets = row[:, None] * row_stride * UNIT + feature[None, :]  # [R F]
    return tl.load(pointer + offsets, inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    weight,
    bias,
    z,
    y,
    rows,
    features,
    x_row,
    z_row,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,  # of the row strides
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    feature = tl.program_id(1) * GROUP + col
    inside = (row < rows)[:, None] & (col < GROUP)[None, :]
    v = _load(x, row, x_row, feature, inside, UNIT, ACC)  # [R F]
    if z is not None:
        zs = _load(z, row, z_row, feature, inside, UNIT, ACC)
        gate = zs * tl.sigmoid(zs)
        if not NORM_FIRST:
            v *= gate
    rstd = tl.rsqrt(tl.sum(v * v, 1) / GROUP + tl.full([], EPS, ACC))  # [R]
    v *= rstd[:, None] * tl.load(weight + feature, col < GROUP, other=0.0).to(ACC)[None, :]
    if bias is not None:
        v += tl.load(bias + feature, col < GROUP, other=0.0).to(ACC)[None, :]
    if z is not None and NORM_FIRST:
        v *= gate
    offsets = row[:, None] * features + feature[None, :]
    tl.store(y + offsets, v.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    x,
    weight,
    bias,
    z,
    dy,
    dx,
    dz,
    dweight,  # [programs features], partial sums
    dbias,
    rows,
    features,
    x_row,
    z_row,
    dy_row,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,  # of the row strides
    ACC: tl.constexpr,
):
    col = tl.arange(0, COLS)
    feature = tl.program_id(1) * GROUP + col
    w = tl.load(weight + feature, col < GROUP, other=0.0).to(ACC)[None, :]  # [1 F]
    dw = tl.zeros([ROWS, COLS], ACC)
    db = tl.zeros([ROWS, COLS], ACC)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (col < GROUP)[None, :]
        offsets = row[:, None] * features + feature[None, :]
        xs = _load(x, row, x_row, feature, inside, UNIT, ACC)  # [R F]
        grad = _load(dy, row, dy_row, feature, inside, UNIT, ACC)
        v = xs
        if z is not None:
            zs = _load(z, row, z_row, feature, inside, UNIT, ACC)
            sigmoid = tl.sigmoid(zs)
            gate = zs * sigmoid
            slope = sigmoid * (1 + zs * (1 - sigmoid))  # of silu
            if not NORM_FIRST:
                v = xs * gate
        rstd = tl.rsqrt(tl.sum(v * v, 1) / GROUP + tl.full([], EPS, ACC))[:, None]
        unit = v * rstd
        if z is not None and NORM_FIRST:
            affine = unit * w
            if bias is not None:
                affine += tl.load(bias + feature, col < GROUP, other=0.0).to(ACC)[None, :]
            tl.store(dz + offsets, (grad * affine * slope).to(dz.dtype.element_ty), inside)
            grad *= gate
        dw += grad * unit
        if bias is not None:
            db += grad
        # through v / rms(v): remove the part of the gradient along v
        grad *= w
        dv = (grad - unit * (tl.sum(grad * unit, 1) / GROUP)[:, None]) * rstd
        if z is not None and not NORM_FIRST:
            tl.store(dz + offsets, (dv * xs * slope).to(dz.dtype.element_ty), inside)
            dv *= gate
        tl.store(dx + offsets, dv.to(dx.dtype.element_ty), inside)
    partial = tl.program_id(0) * features + feature
    tl.store(dweight + partial, tl.sum(dw, 0), col < GROUP)
    if bias is not None:
        tl.store(dbias + partial, tl.sum(db, 0), col < GROUP)


def configuration(group_size: int, per_thread: int) -> dict[str, int]:
    """Rows and features of a tile, and warps, for a group of this size on any architecture."""
    cols = next_power_of_2(group_size)
    rows = max(1, TILE // cols)
    warps = min(max(rows * cols // (32 * per_thread), 4), 16)
    return {"ROWS": rows, "COLS": cols, "num_warps": warps}


def _rows(t: Tensor | None) -> Tensor | None:
    """[rows features] with adjacent features: a view where the strides allow."""
    if t is None:
        return None
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _strides(*tensors: Tensor | None) -> tuple[list[int], int]:
    """The row strides of [rows features] in a unit that divides them, and the unit.

    A kernel that knows the unit reads several features at once, though a projection's width is
    often a multiple of 8 but not of the 16 that Triton looks for.
    """
    strides = [0 if t is None else t.stride(0) for t in tensors]
    unit = common_unit(*strides)
    return [stride // unit for stride in strides], unit


def _launcher(
    kernel: Any, tile: dict[str, int], options: tuple[float, int, bool], unit: int, *tensors
) -> Launcher:
    """Of a kernel, for a tile as `configuration` gives it; the options are eps, the size of a group
    and whether the norm comes before the gate."""
    acc = tl.float64 if accumulator(*tensors) == torch.float64 else tl.float32
    return launcher(kernel, (*options, tile["ROWS"], tile["COLS"], unit, acc), tile["num_warps"])


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    xs, zs = _rows(x), _rows(z)
    rows, features = xs.shape
    tile = configuration(group_size, FORWARD_PER_THREAD)
    bias = None if bias is None else bias.contiguous()
    strides, unit = _strides(xs, zs)
    options = eps, group_size, norm_before_gate
    with torch.cuda.device_of(x):
        _launcher(_forward_kernel, tile, options, unit, x, weight, bias, z)(
            (ceil_divide(rows, tile["ROWS"]), features // group_size),
            (xs, weight.contiguous(), bias, zs, y),
            (rows, features, *strides),
        )
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dz = torch.empty(x.shape, dtype=x.dtype, device=x.device), _empty_like(z, x)
    xs, zs, dys = _rows(x), _rows(z), _rows(dy)
    rows, features = xs.shape
    acc = accumulator(x, weight, bias, z)
    tile, options = (
        configuration(group_size, BACKWARD_PER_THREAD),
        (eps, group_size, norm_before_gate),
    )
    groups = features // group_size
    programs = min(ceil_divide(rows, tile["ROWS"]), ceil_divide(PROGRAMS, groups))
    dweight = torch.empty(programs, features, dtype=acc, device=x.device)
    dbias = torch.empty(0 if bias is None else programs, features, dtype=acc, device=x.device)
    strides, unit = _strides(xs, zs, dys)
    if rows > 0:
        with torch.cuda.device_of(x):
            shift = None if bias is None else bias.contiguous()
            _launcher(_backward_kernel, tile, options, unit, x, weight, bias, z)(
                (programs, groups),
                (xs, weight.contiguous(), shift, zs, dys, dx, dz, dweight, dbias),
                (rows, features, *strides),
            )
    dbias = _empty_like(bias, x) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).to(weight.dtype), dbias, dz


def _empty_like(t: Tensor | None, x: Tensor) -> Tensor:
    """A contiguous tensor of t's shape; without t one of no elements, since an operator in torch's
    library returns no None."""
    if t is None:
        return x.new_empty(0)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


_norm = torch.library.custom_op("ysnake::norm", _forward, mutates_args=())
_norm_backward = torch.library.custom_op("ysnake::norm_backward", _backward, mutates_args=())


@_norm.register_fake
def _(x, weight, bias, z, eps, group_size, norm_before_gate):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_norm_backward.register_fake
def _(dy, x, weight, bias, z, eps, group_size, norm_before_gate):
    return _empty_like(x, x), _empty_like(weight, x), _empty_like(bias, x), _empty_like(z, x)


def _save(ctx, inputs, output):
    x, weight, bias, z, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, z)


def _differentiate(ctx, backward, dy):
    x, weight, bias, z = ctx.saved_tensors
    dx, dweight, dbias, dz = backward(dy, x, weight, bias, z, *ctx.options)
    dbias, dz = None if bias is None else dbias, None if z is None else dz
    return dx, dweight, dbias, dz, None, None, None


_differentiable = Differentiable(_norm, _forward, _save, _differentiate, _norm_backward, _backward)
