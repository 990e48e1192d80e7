"""The three Triton kernels of one token through a whole layer.

Each lasts a few microseconds, so what they wait for counts more than what they compute. A gated
norm divides each row by one number for each group. So the second kernel leaves this out and writes
sums of squares, and the third divides after its product.
"""

import triton
import triton.language as tl

from ysnake_kernels.triton_math import clamp, finite, silu, softplus
from ysnake_kernels.triton_products import dot


@triton.jit
def project_kernel(
    h,  # [batch, features]
    norm_weight,
    weight,  # [outputs, features]
    bias,
    projected,  # [batch, outputs]
    batch,
    features,
    outputs,
    row_stride,  # of `projected`, in units
    EPS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """norm(h) weight^T + bias. The sums of squares come from the same pass over h."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS).to(tl.int64)
    squares = tl.zeros([ROWS], ACC)
    product = tl.zeros([ROWS, COLS], ACC)
    for start in range(0, features, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < features
        at = h + row[:, None] * features + k[None, :]
        v = tl.load(at, (row < batch)[:, None] & inside[None, :], other=0.0).to(ACC)
        squares += tl.sum(v * v, 1)
        v *= tl.load(norm_weight + k, inside, other=0.0).to(ACC)[None, :]
        at = weight + col[None, :] * features + k[:, None]
        w = tl.load(at, inside[:, None] & (col < outputs)[None, :], other=0.0)
        product = dot(v, w, product, OPERAND, PRECISION)
    product *= tl.rsqrt(squares / features + tl.full([], EPS, ACC))[:, None]
    if bias is not None:
        product += tl.load(bias + col, col < outputs, other=0.0).to(ACC)[None, :]
    at = projected + row[:, None] * row_stride * UNIT + col[None, :]
    inside = (row < batch)[:, None] & (col < outputs)[None, :]
    tl.store(at, product.to(projected.dtype.element_ty), inside)


@triton.jit
def _convolve(
    new, history, taps, bias, c, inside, token, tap_channel, tap_token,
    WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """silu of the convolution at channels c, from the new token and those of the history."""
    taps += c * tap_channel
    v = tl.load(new + c, inside, other=0.0).to(ACC)
    v *= tl.load(taps + (WIDTH - 1) * tap_token, inside, other=0.0).to(ACC)
    for k in tl.static_range(WIDTH - 1):
        old = tl.load(history + k * token, inside, other=0.0).to(ACC)
        v += old * tl.load(taps + k * tap_token, inside, other=0.0).to(ACC)
    if bias is not None:
        v += tl.load(bias + c, inside, other=0.0).to(ACC)
    return silu(v)


@triton.jit
def mix_kernel(
    state,  # [batch, heads, P, N]
    projected,  # [batch, outputs]: z, x, B, C, dt
    history,  # [batch, channels, WIDTH - 1]
    taps,  # [channels, WIDTH]
    conv_bias,
    dt_bias,
    A,
    D,
    norm_weight,
    y,  # [batch, heads P]
    squares,  # [batch, heads, tiles]
    row_stride,  # of `projected`, in units
    history_batch,
    history_channel,
    history_token,
    tap_channel,
    tap_token,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Convolution, recurrence and gate of some rows of a head's state. The history stays."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    p = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLS)
    at = state + (batch * HEADS + head) * (P * N) + p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    S = tl.load(at, inside, other=0.0).to(ACC)  # [P N]

    inner = HEADS * P
    projected += batch * row_stride * UNIT
    history += batch * history_batch
    x_at, B_at = head * P + p, inner + group * N + n
    C_at, new = B_at + GROUPS * N, projected + inner
    x = _convolve(
        new, history + x_at * history_channel, taps, conv_bias, x_at, p < P,
        history_token, tap_channel, tap_token, WIDTH, ACC,
    )  # fmt: skip
    B = _convolve(
        new, history + B_at * history_channel, taps, conv_bias, B_at, n < N,
        history_token, tap_channel, tap_token, WIDTH, ACC,
    )  # fmt: skip
    C = _convolve(
        new, history + C_at * history_channel, taps, conv_bias, C_at, n < N,
        history_token, tap_channel, tap_token, WIDTH, ACC,
    )  # fmt: skip

    dt = tl.load(projected + 2 * inner + 2 * GROUPS * N + head).to(ACC)
    dt = clamp(softplus(dt + tl.load(dt_bias + head).to(ACC)), LOW, HIGH)
    S *= tl.exp(dt * finite(tl.load(A + head).to(ACC)))
    S += (dt * x)[:, None] * B[None, :]
    tl.store(at, S.to(state.dtype.element_ty), inside)

    out = tl.sum(S * C[None, :], 1) + x * tl.load(D + head).to(ACC)
    out *= silu(tl.load(projected + x_at, p < P, other=0.0).to(ACC))
    tile = (batch * HEADS + head) * tl.num_programs(2) + tl.program_id(2)
    tl.store(squares + tile, tl.sum(tl.where(p < P, out * out, 0.0), 0))
    out *= tl.load(norm_weight + x_at, p < P, other=0.0).to(ACC)
    tl.store(y + batch * inner + x_at, out.to(y.dtype.element_ty), p < P)


@triton.jit
def _move_on(
    history, new, rows_inside, channels, channel, token, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Drop the oldest token of this program's channels, and append the new one."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = rows_inside[:, None] & (c < channels)[None, :]
    at = history + c[None, :] * channel
    for k in tl.static_range(WIDTH - 2):
        tl.store(at + k * token, tl.load(at + (k + 1) * token, inside), inside)
    last = tl.load(new + c[None, :], inside)
    tl.store(at + (WIDTH - 2) * token, last.to(history.dtype.element_ty), inside)


@triton.jit
def join_kernel(
    h,  # [batch, features]
    y,  # [batch, d_inner], not divided yet
    squares,  # [batch, groups, PARTS]
    weight,  # [features, d_inner]
    bias,
    projected,  # [batch, outputs]
    history,  # [batch, channels, WIDTH - 1]
    batch,
    features,
    row_stride,  # of `projected`, in units
    channels,
    history_batch,
    history_channel,
    history_token,
    EPS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # features of the gated norm's group
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h += y weight^T + bias, where each group of y is divided by its rms. Moves the history on."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS).to(tl.int64)
    part = tl.arange(0, PADDED_PARTS)
    inner = GROUPS * GROUP
    total = tl.zeros([ROWS, COLS], ACC)
    for group in tl.static_range(GROUPS):
        product = tl.zeros([ROWS, COLS], ACC)
        for start in range(0, GROUP, DEPTH):
            k = start + tl.arange(0, DEPTH)
            at = y + row[:, None] * inner + (group * GROUP + k)[None, :]
            v = tl.load(at, (row < batch)[:, None] & (k < GROUP)[None, :], other=0.0)
            at = weight + col[None, :] * inner + (group * GROUP + k)[:, None]
            w = tl.load(at, (k < GROUP)[:, None] & (col < features)[None, :], other=0.0)
            product = dot(v, w, product, OPERAND, PRECISION)
        at = squares + (row[:, None] * GROUPS + group) * PARTS + part[None, :]
        sums = tl.load(at, (row < batch)[:, None] & (part < PARTS)[None, :], other=0.0)
        total += product * tl.rsqrt(tl.sum(sums, 1) / GROUP + tl.full([], EPS, ACC))[:, None]
    if bias is not None:
        total += tl.load(bias + col, col < features, other=0.0).to(ACC)[None, :]
    at = h + row[:, None] * features + col[None, :]
    inside = (row < batch)[:, None] & (col < features)[None, :]
    total += tl.load(at, inside, other=0.0).to(ACC)
    tl.store(at, total.to(h.dtype.element_ty), inside)

    new = projected + row[:, None] * row_stride * UNIT + inner
    history += row[:, None] * history_batch
    _move_on(history, new, row < batch, channels, history_channel, history_token, CHANNELS, WIDTH)
