"""Gated RMSNorm in Triton: one kernel forward and one backward. Each reads its inputs once.

A program owns a block of rows of one group of features. Backward computes what it needs from the
inputs again. It sums the gradients of weight and bias over a program's rows in registers, and torch
adds the sums of all programs.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable, empty_gradients
from ysnake_kernels.norm.inputs import NormInputs
from ysnake_kernels.numerics import accumulator, ceil_divide, common_unit, next_power_of_2
from ysnake_kernels.triton_launch import Launcher, launcher, triton_accumulator
from ysnake_kernels.triton_math import silu, silu_slope

MAX_GROUP = 16384  # features that a program holds in registers
TILE = 2048  # elements that a program works on at once, if a group is not larger
FORWARD_PER_THREAD, BACKWARD_PER_THREAD = 16, 8  # elements; with more, registers spill
PROGRAMS = 512  # of the backward at most; a few for every multiprocessor, each with partial sums


def norm(inputs: NormInputs, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm_gated` of inputs that it has checked.

    Raises:
        ValueError: a group does not fit the registers of a multiprocessor.
    """
    check_group(inputs.group_size)
    return _differentiable(*inputs, out_dtype)


def check_group(group_size: int) -> None:
    """Raise ValueError where a group does not fit the registers of a multiprocessor."""
    if group_size > MAX_GROUP:
        raise ValueError(
            f"group_size: expected at most {MAX_GROUP} with backend 'fused', got {group_size}"
        )


@triton.jit
def _load(
    pointer, start, rows, row_stride, col, GROUP: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `start` on, of this program's group, in their own dtype."""
    row = start + tl.arange(0, ROWS).to(tl.int64)
    offsets = row[:, None] * row_stride * UNIT + (tl.program_id(1) * GROUP + col)[None, :]
    return tl.load(pointer + offsets, (row < rows)[:, None] & (col < GROUP)[None, :], other=0.0)


@triton.jit
def _load_parameter(pointer, feature, col, GROUP: tl.constexpr, ACC: tl.constexpr):
    """Weight or bias of this program's group, [1 F]."""
    return tl.load(pointer + feature, col < GROUP, other=0.0).to(ACC)[None, :]


@triton.jit
def _rstd(v, GROUP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """1 / rms(v) of each row, [R 1]."""
    return tl.rsqrt(tl.sum(v * v, 1) / GROUP + tl.full([], EPS, ACC))[:, None]


@triton.jit
def _through_rms(grad, normalised, rstd, GROUP: tl.constexpr):
    """The gradient of v from `grad`, that of normalised = v rstd. It has no part along v."""
    return (grad - normalised * (tl.sum(grad * normalised, 1) / GROUP)[:, None]) * rstd


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    weight,
    bias,
    z,
    added,  # to x before the norm, or None
    y,
    total,  # x + added
    rows,
    features,
    x_row,
    z_row,
    added_row,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,  # of the row strides
    ACC: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    row = start + tl.arange(0, ROWS).to(tl.int64)
    col = tl.arange(0, COLS)
    feature = tl.program_id(1) * GROUP + col
    inside = (row < rows)[:, None] & (col < GROUP)[None, :]
    offsets = row[:, None] * features + feature[None, :]
    v = _load(x, start, rows, x_row, col, GROUP, ROWS, UNIT).to(ACC)  # [R F]
    if added is not None:
        v += _load(added, start, rows, added_row, col, GROUP, ROWS, UNIT).to(ACC)
        v = v.to(total.dtype.element_ty)
        tl.store(total + offsets, v, inside)
        v = v.to(ACC)
    if z is not None:
        zs = _load(z, start, rows, z_row, col, GROUP, ROWS, UNIT).to(ACC)
        gate = silu(zs)
        if not NORM_FIRST:
            v *= gate
    v *= _rstd(v, GROUP, EPS, ACC) * _load_parameter(weight, feature, col, GROUP, ACC)
    if bias is not None:
        v += _load_parameter(bias, feature, col, GROUP, ACC)
    if z is not None and NORM_FIRST:
        v *= gate
    tl.store(y + offsets, v.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    x,
    weight,
    bias,
    z,
    dy,
    more,  # to be added to dx, or None
    dx,
    dadded,  # a copy of dx in another dtype, or None
    dz,
    dweight,  # [programs features], partial sums
    dbias,
    rows,
    features,
    x_row,
    z_row,
    dy_row,
    more_row,
    dz_row,
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
    w = _load_parameter(weight, feature, col, GROUP, ACC)
    dw = tl.zeros([ROWS, COLS], ACC)
    db = tl.zeros([ROWS, COLS], ACC)
    # The next rows are loaded while these are computed.
    start = tl.program_id(0) * ROWS
    next_x = _load(x, start, rows, x_row, col, GROUP, ROWS, UNIT)
    next_dy = _load(dy, start, rows, dy_row, col, GROUP, ROWS, UNIT)
    if z is not None:
        next_z = _load(z, start, rows, z_row, col, GROUP, ROWS, UNIT)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (col < GROUP)[None, :]
        offsets = row[:, None] * features + feature[None, :]
        if z is not None:
            at_dz = dz + row[:, None] * dz_row * UNIT + feature[None, :]
        xs, grad = next_x.to(ACC), next_dy.to(ACC)  # [R F]
        following = start + tl.num_programs(0) * ROWS
        next_x = _load(x, following, rows, x_row, col, GROUP, ROWS, UNIT)
        next_dy = _load(dy, following, rows, dy_row, col, GROUP, ROWS, UNIT)
        v = xs
        if z is not None:
            zs = next_z.to(ACC)
            next_z = _load(z, following, rows, z_row, col, GROUP, ROWS, UNIT)
            gate, slope = silu(zs), silu_slope(zs)
            if not NORM_FIRST:
                v = xs * gate
        rstd = _rstd(v, GROUP, EPS, ACC)
        normalised = v * rstd
        if z is not None and NORM_FIRST:
            affine = normalised * w
            if bias is not None:
                affine += _load_parameter(bias, feature, col, GROUP, ACC)
            tl.store(at_dz, (grad * affine * slope).to(dz.dtype.element_ty), inside)
            grad *= gate
        dw += grad * normalised
        if bias is not None:
            db += grad
        dv = _through_rms(grad * w, normalised, rstd, GROUP)
        if z is not None and not NORM_FIRST:
            tl.store(at_dz, (dv * xs * slope).to(dz.dtype.element_ty), inside)
            dv *= gate
        if more is not None:
            dv += _load(more, start, rows, more_row, col, GROUP, ROWS, UNIT).to(ACC)
        tl.store(dx + offsets, dv.to(dx.dtype.element_ty), inside)
        if dadded is not None:
            tl.store(dadded + offsets, dv.to(dadded.dtype.element_ty), inside)
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


def _rows(t: Tensor) -> Tensor:
    """[rows features] with adjacent features: a view where the strides allow."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _rows_if_given(t: Tensor | None) -> Tensor | None:
    return None if t is None else _rows(t)


def _strides(*tensors: Tensor | None) -> tuple[list[int], int]:
    """The row strides of [rows features] in a unit that divides all of them, and the unit.

    A kernel that knows the unit reads several features at once. Triton by itself does so only for
    multiples of 16, and the width of a projection is often a multiple of 8 only.
    """
    strides = [0 if t is None else t.stride(0) for t in tensors]
    unit = common_unit(*strides)
    return [stride // unit for stride in strides], unit


def _launcher(kernel: Any, tile: dict[str, int], inputs: NormInputs, unit: int) -> Launcher:
    """The launcher of a kernel for a tile that `configuration` gives."""
    acc = triton_accumulator(*inputs.tensors)
    constants = (*inputs[4:], tile["ROWS"], tile["COLS"], unit, acc)
    return launcher(kernel, constants, tile["num_warps"])


def add_and_norm(
    inputs: NormInputs, added: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + added in x's dtype (x itself without `added`), and its norm in `out_dtype`."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    total = x if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return total, y
    xs, zs, adds = _rows(x), _rows_if_given(inputs.z), _rows_if_given(added)
    rows, features = xs.shape
    group_size = inputs.group_size
    tile = configuration(group_size, FORWARD_PER_THREAD)
    shift = None if bias is None else bias.contiguous()
    strides, unit = _strides(xs, zs, adds)
    with torch.cuda.device_of(x):
        _launcher(_forward_kernel, tile, inputs, unit)(
            (ceil_divide(rows, tile["ROWS"]), features // group_size),
            (xs, weight.contiguous(), shift, zs, adds, y, None if added is None else total),
            (rows, features, *strides),
        )
    return total, y


def gradients(
    inputs: NormInputs,
    dy: Tensor,
    dtotal: Tensor | None = None,
    added_dtype: torch.dtype | None = None,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, of what was added to it, of weight, bias and z.

    Args:
        inputs: those of the norm; x is the sum that `add_and_norm` returned.
        dy: the gradient of the norm.
        dtotal: the gradient of the sum from elsewhere, which is added to that of x.
        added_dtype: of what was added to x; None if nothing was.
        dz: where the gradient of z is written, with adjacent features; None means new memory.
    """
    x, weight, bias, z = inputs.x, inputs.weight, inputs.bias, inputs.z

    def like(t: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(t.shape, dtype=dtype, device=t.device)

    dx = like(x, x.dtype)
    dz = like(z, z.dtype) if dz is None and z is not None else dz
    dadded = None if added_dtype is None else like(x, added_dtype)
    xs, dys, zs, dtotals = _rows(x), _rows(dy), _rows_if_given(z), _rows_if_given(dtotal)
    rows, features = xs.shape
    acc = accumulator(x, weight, bias, z)
    group_size = inputs.group_size
    tile = configuration(group_size, BACKWARD_PER_THREAD)
    groups = features // group_size
    programs = min(ceil_divide(rows, tile["ROWS"]), ceil_divide(PROGRAMS, groups))
    dweights = torch.empty(programs, features, dtype=acc, device=x.device)
    dbiases = None if bias is None else torch.empty_like(dweights)
    dzs = None if dz is None else dz.view(-1, features)
    strides, unit = _strides(xs, zs, dys, dtotals, dzs)
    if rows > 0:
        with torch.cuda.device_of(x):
            taken = (xs, weight.contiguous(), None if bias is None else bias.contiguous())
            written = (dx, dadded, dzs, dweights, dbiases)
            _launcher(_backward_kernel, tile, inputs, unit)(
                (programs, groups),
                (*taken, zs, dys, dtotals, *written),
                (rows, features, *strides),
            )
    dbias = None
    if bias is not None and dbiases is not None:
        dbias = dbiases.sum(0).to(bias.dtype)
    return dx, dadded, dweights.sum(0).to(weight.dtype), dbias, dz


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
    inputs = NormInputs(x, weight, bias, z, eps, group_size, norm_before_gate)
    return add_and_norm(inputs, None, out_dtype)[1]


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
    inputs = NormInputs(x, weight, bias, z, eps, group_size, norm_before_gate)
    dx, _, dweight, dbias, dz = gradients(inputs, dy)
    dbias = x.new_empty(0) if dbias is None else dbias  # a custom operator cannot return None
    return dx, dweight, dbias, x.new_empty(0) if dz is None else dz


_norm = torch.library.custom_op("ysnake::norm", _forward, mutates_args=())
_norm_backward = torch.library.custom_op("ysnake::norm_backward", _backward, mutates_args=())


@_norm.register_fake
def _(x, weight, bias, z, eps, group_size, norm_before_gate, out_dtype):
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


@_norm_backward.register_fake
def _(dy, x, weight, bias, z, eps, group_size, norm_before_gate):
    return tuple(empty_gradients(x, weight, bias, z))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, z, *options, _ = inputs
    ctx.save_for_backward(x, weight, bias, z)
    ctx.options = options


def _differentiate(ctx: Any, backward: Callable, dy: Tensor) -> tuple:
    x, weight, bias, z = ctx.saved_tensors
    dx, dweight, dbias, dz = backward(dy, x, weight, bias, z, *ctx.options)
    dbias, dz = None if bias is None else dbias, None if z is None else dz
    return dx, dweight, dbias, dz, None, None, None, None


_differentiable = Differentiable(_norm, _forward, _save, _differentiate, _norm_backward, _backward)
