"""The convolution's Triton kernels: forward, backward and one token. `fused.py` launches them.

A program owns a block of channels of LANES x RUN consecutive tokens. Each lane walks along its run
of tokens. It keeps the last tokens, or the gradients that are not complete yet, in registers. So it
reads each value and computes each SiLU about once. The channels of a block lie side by side in
channel-last memory, as a projection writes it, so a program reads whole cache lines. Backward
computes what it needs from the inputs again.

In the shape comments I is the lanes, C the channels and J the tokens of the history.
"""

# mypy: ignore-errors
# The bodies are in Triton's language, in which a tuple may grow in a loop.

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ysnake_kernels.triton_math import silu_slope


class Block(NamedTuple):
    """What a program owns: of sequence `batch`, RUN tokens of each lane, and channels c."""

    batch: Any
    start: Any  # the first token of the first lane
    run: Any  # [I] the first token of each lane, counted from start
    lane: Any  # [I] the first token of each lane
    c: Any  # [C]
    inside: Any  # [1 C] which of the channels exist


@triton.jit
def _block(first, length, channels, LANES: tl.constexpr, RUN: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's block of sequences with the tokens from `first` to `length`."""
    blocks = tl.cdiv(length - first, LANES * RUN)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    start = first + tl.program_id(0) % blocks * (LANES * RUN)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    inside = (c < channels)[None, :]
    run = tl.arange(0, LANES) * RUN
    return Block(batch, start, run, start + run, c, inside)


@triton.jit
def _taps(weight, c, channels, W: tl.constexpr, ACC: tl.constexpr):
    """The weights of each tap, [1 C]."""
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + c * W + k, c < channels, other=0.0).to(ACC)[None, :],)
    return taps


@triton.jit
def _lanes(pointer, block, batch_stride, channel_stride, token_stride, UNIT: tl.constexpr):
    """Pointers [I C] to the channels of the first token of each lane."""
    pointer += block.batch * batch_stride * UNIT + block.start.to(tl.int64) * token_stride * UNIT
    pointer += block.c[None, :] * channel_stride + block.run[:, None] * token_stride * UNIT
    return pointer


@triton.jit
def _token(x, history, history_token, t, length, inside, W: tl.constexpr, ACC: tl.constexpr):
    """The values of tokens t [I], to which x points, [I C].

    Tokens before the first come from the history. Others outside the sequence are zeros.
    """
    t = t[:, None]
    v = tl.load(x, inside & (t >= 0) & (t < length), other=0.0).to(ACC)
    if history is not None:
        at = history + (t + W - 1) * history_token
        v += tl.load(at, inside & (t < 0) & (t >= 1 - W), other=0.0).to(ACC)
    return v


@triton.jit
def _sum(xs, docs, s, taps, bias, c, channels, W: tl.constexpr, ACC: tl.constexpr):
    """The convolution at token s of each lane, before the activation, [I C]."""
    v = xs[s + W - 1] * taps[W - 1]
    if bias is not None:
        v += tl.load(bias + c, c < channels, other=0.0).to(ACC)[None, :]
    for k in tl.static_range(W - 1):
        term = xs[s + k] * taps[k]
        if len(docs) > 0:
            term = tl.where((docs[s + k] == docs[s + W - 1])[:, None], term, 0)
        v += term
    return v


@triton.jit
def _document(seq, t, length):
    """The documents of tokens t [I]. A token outside the sequence has that of the nearest token."""
    t = tl.minimum(tl.maximum(t, 0), length - 1)
    return tl.load(seq + t)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    x,
    weight,
    bias,
    seq,
    history,
    y,
    final,
    channels,
    length,
    history_batch,
    history_channel,
    history_token,
    x_batch,
    x_channel,
    x_token,
    y_batch,
    y_channel,
    y_token,
    W: tl.constexpr,
    SILU: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of x and y over batch and tokens
    ACC: tl.constexpr,
):
    block = _block(0, length, channels, LANES, RUN, CHANNELS)
    batch, start, run, lane, c, inside = block
    x0 = x + batch * x_batch * UNIT + c[None, :] * x_channel  # [1 C] the sequence's first token
    x = x0 + start.to(tl.int64) * x_token * UNIT + run[:, None] * x_token * UNIT  # [I C]
    y += batch * y_batch * UNIT + c[None, :] * y_channel
    y += start.to(tl.int64) * y_token * UNIT + run[:, None] * y_token * UNIT
    if history is not None:
        history += batch * history_batch + c[None, :] * history_channel
    if seq is not None:
        seq += batch * length
    taps = _taps(weight, c, channels, W, ACC)

    xs, docs = (), ()  # of the tokens from lane - (W - 1) on
    for s in tl.static_range(1 - W, RUN):
        at, before = x + s * x_token * UNIT, history if s < 0 else None
        xs += (_token(at, before, history_token, lane + s, length, inside, W, ACC),)
        if seq is not None:
            docs += (_document(seq, lane + s, length),)
    for s in tl.static_range(RUN):
        v = _sum(xs, docs, s, taps, bias, c, channels, W, ACC)
        if SILU:
            v *= tl.sigmoid(v)
        here = inside & (lane + s < length)[:, None]
        tl.store(y + s * y_token * UNIT, v.to(y.dtype.element_ty), here)

    if start == 0:  # the last W - 1 tokens, of the last token's document
        j = tl.arange(0, 4)  # [J]
        t = length - (W - 1) + j
        tail = x0 + t.to(tl.int64)[:, None] * x_token * UNIT
        last = _token(tail, history, history_token, t, length, inside, W, ACC)
        if seq is not None:
            same = _document(seq, t, length) == tl.load(seq + length - 1)
            last = tl.where(same[:, None], last, 0)
        state = final + (batch * channels + c[None, :]) * (W - 1) + j[:, None]
        tl.store(state, last.to(final.dtype.element_ty), inside & (j < W - 1)[:, None])


@triton.jit
def _add_to_sums(sums, g, xs, docs, s, W: tl.constexpr):
    """The sums for weights and bias, with what token s of each lane adds.

    g is the gradient of the token's output before the activation.
    """
    bias = sums[W] + g
    total = ()
    for k in tl.static_range(W):
        term = g * xs[s + k]
        if len(docs) > 0 and k < W - 1:
            term = tl.where((docs[s + k] == docs[s + W - 1])[:, None], term, 0)
        total += (sums[k] + term,)
    total += (bias,)
    return total


@triton.jit
def _gradient_of_token(gs, docs, s, taps, W: tl.constexpr):
    """The gradient of token s of each lane, [I C].

    gs are the gradients of the outputs of tokens s to s + W - 1 before the activation.
    """
    d = gs[s] * taps[W - 1]
    for k in tl.static_range(1, W):
        term = gs[s + k] * taps[W - 1 - k]
        if len(docs) > 0:
            term = tl.where((docs[s + W - 1] == docs[s + W - 1 + k])[:, None], term, 0)
        d += term
    return d


@triton.jit
def _is_in_final_state(j, seq, docs, s, length, W: tl.constexpr):
    """Whether each lane's token is in the final state, [I 1].

    j [I 1] is its place there, and docs[s] is its document. Only tokens of the last document are in
    the final state.
    """
    last = (j >= 0) & (j < W - 1)
    if seq is not None:
        last &= (docs[s] == tl.load(seq + length - 1))[:, None]
    return last


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    x,
    weight,
    bias,
    seq,
    history,
    dy,
    dfinal,
    dx,
    dhistory,
    partial,  # [batch blocks, W + 1, channels] of the weights, then the bias
    channels,
    length,
    history_batch,
    history_channel,
    history_token,
    x_batch,
    x_channel,
    x_token,
    dy_batch,
    dy_channel,
    dy_token,
    dx_batch,
    dx_channel,
    dx_token,
    W: tl.constexpr,
    SILU: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of x, dy and dx over batch and tokens
    ACC: tl.constexpr,
):
    first = 0 if history is None else 1 - W  # the history's tokens get a gradient too
    block = _block(first, length, channels, LANES, RUN, CHANNELS)
    batch, _, _, lane, c, inside = block
    x = _lanes(x, block, x_batch, x_channel, x_token, UNIT)
    dy = _lanes(dy, block, dy_batch, dy_channel, dy_token, UNIT)
    dx = _lanes(dx, block, dx_batch, dx_channel, dx_token, UNIT)
    state = (batch * channels + c[None, :]) * (W - 1)
    if history is not None:
        history += batch * history_batch + c[None, :] * history_channel
    if seq is not None:
        seq += batch * length
    taps = _taps(weight, c, channels, W, ACC)
    sums = (tl.zeros([LANES, CHANNELS], ACC),) * (W + 1)  # of the weights, then the bias

    xs, docs, gs = (), (), ()  # of the tokens from lane - (W - 1), and from lane on
    for s in tl.static_range(1 - W, RUN + W - 1):
        at, before = x + s * x_token * UNIT, history if s < W - 1 else None
        xs += (_token(at, before, history_token, lane + s, length, inside, W, ACC),)
        if seq is not None:
            docs += (_document(seq, lane + s, length),)
        if s >= 0:
            gs += (_token(dy + s * dy_token * UNIT, None, 0, lane + s, length, inside, W, ACC),)

    done = ()  # gradients before the activation
    for s in tl.static_range(RUN + W - 1):
        g = gs[s]
        if SILU:
            g *= silu_slope(_sum(xs, docs, s, taps, bias, c, channels, W, ACC))
        done += (g,)
        if s < RUN:
            sums = _add_to_sums(sums, g, xs, docs, s, W)
        if s >= W - 1:  # the gradient of the token W - 1 places before is complete
            d = _gradient_of_token(done, docs, s - W + 1, taps, W)
            t = lane[:, None] + (s - W + 1)
            if dfinal is not None:
                j = t - (length - W + 1)  # [I 1]
                last = _is_in_final_state(j, seq, docs, s, length, W)
                d += tl.load(dfinal + state + j, inside & last, other=0.0).to(ACC)
            here = inside & (t >= 0) & (t < length)
            tl.store(dx + (s - W + 1) * dx_token * UNIT, d.to(dx.dtype.element_ty), here)
            if history is not None and s < 2 * (W - 1):
                j = t + W - 1
                tl.store(dhistory + state + j, d.to(dhistory.dtype.element_ty), inside & (t < 0))

    partial += tl.program_id(0).to(tl.int64) * ((W + 1) * channels) + c
    for k in tl.static_range(W + 1):
        tl.store(partial + k * channels, tl.sum(sums[k], 0), c < channels)


@triton.jit
def step_kernel(
    x,
    state,
    weight,
    bias,
    indices,
    y,
    channels,
    x_batch,
    x_channel,
    state_row,
    state_channel,
    state_token,
    W: tl.constexpr,
    OLDER: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One new token x [batch, channels] of each row, and the state [rows, channels, OLDER + W - 1].

    No tap reads the OLDER tokens at the start. They only move by one place. weight is
    [channels, W]; its last tap belongs to the new token.
    """
    batch = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)  # [C]
    inside = c < channels
    row = batch if indices is None else tl.load(indices + batch).to(tl.int64)
    used = row + c * 0 >= 0  # [C]; a row of -1 is padding
    state += row * state_row + c * state_channel
    for _ in range(OLDER):
        tl.store(state, tl.load(state + state_token, inside & used, other=0.0), inside & used)
        state += state_token
    new = tl.load(x + batch * x_batch + c * x_channel, inside, other=0.0)
    v = new.to(ACC) * tl.load(weight + c * W + W - 1, inside, other=0.0).to(ACC)
    if bias is not None:
        v += tl.load(bias + c, inside, other=0.0).to(ACC)
    for k in tl.static_range(W - 1):
        old = tl.load(state + k * state_token, inside & used, other=0.0)
        v += old.to(ACC) * tl.load(weight + c * W + k, inside, other=0.0).to(ACC)
        if k > 0:
            tl.store(state + (k - 1) * state_token, old, inside & used)
    tl.store(state + (W - 2) * state_token, new.to(state.dtype.element_ty), inside & used)
    if SILU:
        v *= tl.sigmoid(v)
    v = tl.where(used, v, 0.0)
    tl.store(y + batch * channels + c, v.to(y.dtype.element_ty), inside)
