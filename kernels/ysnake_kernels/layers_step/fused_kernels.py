"""The two Triton kernels of one token through a layer, besides its projections.

Each takes a few microseconds, so waiting counts more than arithmetic. The gated norm divides a row
by its rms. The first kernel does not wait for the rms: it writes the row undivided, and partial
sums of squares. The second kernel divides the row after the output projection.
"""

import triton
import triton.language as tl

from ysnake_kernels.triton_math import clamp, finite, silu, softplus


@triton.jit
def _convolve(tensors, strides, c, inside, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """silu of the convolution at channels c, from the new token and those of the history.

    `tensors` are the new token, the history, taps and bias. `strides` are those of the history over
    channels and tokens, and those of the taps over channels and tokens.
    """
    new, history, taps, bias = tensors
    history_channel, history_token, tap_channel, tap_token = strides
    history += c * history_channel
    taps += c * tap_channel
    v = tl.load(new + c, inside, other=0.0).to(ACC)
    v *= tl.load(taps + (WIDTH - 1) * tap_token, inside, other=0.0).to(ACC)
    for k in tl.static_range(WIDTH - 1):
        old = tl.load(history + k * history_token, inside, other=0.0).to(ACC)
        v += old * tl.load(taps + k * tap_token, inside, other=0.0).to(ACC)
    if bias is not None:
        v += tl.load(bias + c, inside, other=0.0).to(ACC)
    return silu(v)


@triton.jit
def mix_kernel(
    state,  # [batch, heads, P, N]
    projected,  # [batch, features]: z, x, B, C, dt
    history,  # [batch, channels, WIDTH - 1]
    taps,  # [channels, WIDTH]
    conv_bias,
    dt_bias,
    A,
    D,
    norm_weight,
    y,  # [batch, heads P]
    squares,  # [batch, heads, programs]
    row_stride,  # of `projected`, in units
    history_batch,
    history_channel,
    history_token,
    tap_channel,
    tap_token,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Convolution, recurrence and gate of some tiles of a head's state. The history stays."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.program_id(2) * (TILES * ROWS)
    n = tl.arange(0, COLS)
    state += (batch * HEADS + head) * (P * N) + n[None, :]
    p = first + tl.arange(0, ROWS)
    following = tl.load(state + p[:, None] * N, (p < P)[:, None] & (n < N)[None, :], other=0.0)

    projected += batch * row_stride * UNIT
    new = projected + HEADS * P
    tensors = (new, history + batch * history_batch, taps, conv_bias)
    strides = (history_channel, history_token, tap_channel, tap_token)
    B_at = HEADS * P + n
    B = _convolve(tensors, strides, B_at, n < N, WIDTH, ACC)
    C = _convolve(tensors, strides, B_at + N, n < N, WIDTH, ACC)
    row = first + tl.arange(0, TILES * ROWS)
    c = head * P + row
    x = _convolve(tensors, strides, c, row < P, WIDTH, ACC)
    gate = silu(tl.load(projected + c, row < P, other=0.0).to(ACC))
    weight = tl.load(norm_weight + c, row < P, other=0.0).to(ACC)
    dt = tl.load(new + HEADS * P + 2 * N + head).to(ACC)
    dt = clamp(softplus(dt + tl.load(dt_bias + head).to(ACC)), LOW, HIGH)
    decay = tl.exp(dt * finite(tl.load(A + head).to(ACC)))

    # Each thread computes few rows of x. Only a tile's rows are then passed to all threads.
    sources = tl.reshape(dt * x, [TILES, ROWS])
    outs = tl.zeros([TILES, ROWS], ACC)
    for tile in tl.static_range(TILES):
        S = following.to(ACC) * decay  # [P N]
        p = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (p < P)[:, None] & (n < N)[None, :]
        if tile + 1 < TILES:  # load the next tile while this one is computed
            q = p + ROWS
            there = (q < P)[:, None] & (n < N)[None, :]
            following = tl.load(state + q[:, None] * N, there, other=0.0)
        here = (tl.arange(0, TILES) == tile)[:, None]
        S += tl.sum(tl.where(here, sources, 0.0), 0)[:, None] * B[None, :]
        tl.store(state + p[:, None] * N, S.to(state.dtype.element_ty), inside)
        outs = tl.where(here, tl.sum(S * C[None, :], 1)[None, :], outs)

    out = tl.reshape(outs, [TILES * ROWS]) + x * tl.load(D + head).to(ACC)
    out = tl.where(row < P, out * gate, 0.0)
    part = (batch * HEADS + head) * tl.num_programs(2) + tl.program_id(2)
    tl.store(squares + part, tl.sum(out * out, 0))
    tl.store(y + batch * (HEADS * P) + c, (out * weight).to(y.dtype.element_ty), row < P)


@triton.jit
def _add_and_norm(
    h, mixed, squares, bias, norm_weight, normed, row, features, EPS: tl.constexpr,
    MIXER_EPS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
    COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, COLS)
    inside = col < features
    v = tl.load(h + row * features + col, inside, other=0.0).to(ACC)
    if mixed is not None:
        part = tl.arange(0, PADDED_PARTS)
        sums = tl.load(squares + row * PARTS + part, part < PARTS, other=0.0)
        rstd = tl.rsqrt(tl.sum(sums, 0) / INNER + tl.full([], MIXER_EPS, ACC))
        v += tl.load(mixed + row * features + col, inside, other=0.0).to(ACC) * rstd
        if bias is not None:
            v += tl.load(bias + col, inside, other=0.0).to(ACC)
        v = v.to(h.dtype.element_ty)
        tl.store(h + row * features + col, v, inside)
        v = v.to(ACC)
    v *= tl.rsqrt(tl.sum(v * v, 0) / features + tl.full([], EPS, ACC))
    v *= tl.load(norm_weight + col, inside, other=0.0).to(ACC)
    tl.store(normed + row * features + col, v.to(normed.dtype.element_ty), inside)


@triton.jit
def _move_on(history, new, channels, channel, token, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Drop the oldest token of the history, and append the new one."""
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = history + c * channel
        for k in tl.static_range(WIDTH - 2):
            tl.store(at + k * token, tl.load(at + (k + 1) * token, c < channels), c < channels)
        last = tl.load(new + c, c < channels)
        tl.store(at + (WIDTH - 2) * token, last.to(history.dtype.element_ty), c < channels)


@triton.jit
def join_kernel(
    h,  # [batch, features]
    mixed,  # [batch, features], not divided yet; None before the first layer
    squares,  # [batch, PARTS]
    bias,
    norm_weight,
    normed,  # [batch, features]
    projected,  # [batch, ...] of the layer before
    history,  # [batch, channels, WIDTH - 1] of the layer before
    features,
    channels,
    row_stride,  # of `projected`, in units
    history_batch,
    history_channel,
    history_token,
    EPS: tl.constexpr,
    MIXER_EPS: tl.constexpr,
    INNER: tl.constexpr,  # features of the gated norm
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add mixed / rms + bias to h, and write the norm of h.

    Other programs shift the convolution history of the layer before by one token.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _add_and_norm(
            h, mixed, squares, bias, norm_weight, normed, row, features, EPS, MIXER_EPS, INNER,
            PARTS, PADDED_PARTS, COLS, ACC,
        )  # fmt: skip
    elif mixed is not None:
        new = projected + row * row_stride * UNIT + INNER
        history += row * history_batch
        _move_on(history, new, channels, history_channel, history_token, 1024, WIDTH)
