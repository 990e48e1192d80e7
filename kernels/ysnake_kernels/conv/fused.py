"""Causal depthwise convolution in Triton: forward, backward and one token, SiLU fused.

A program owns a block of channels of LANES x RUN consecutive tokens. Each lane walks along its run
and keeps the last tokens, or the gradients not yet complete, in registers, so that every value is
read about once and SiLU is recomputed once. Lanes hold channels side by side: channel-last memory,
as it comes out of a projection, is read in whole lines. Backward recomputes from the inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable, InPlace
from ysnake_kernels.memory import empty_like
from ysnake_kernels.numerics import accumulator, ceil_divide, common_unit
from ysnake_kernels.triton_launch import launcher

MAX_WIDTH = 4
# used on every card; BACKWARD is the fastest on an H200, FORWARD spills nothing on sm_80
FORWARD = {"LANES": 16, "RUN": 8, "CHANNELS": 64, "num_warps": 4}
BACKWARD = {"LANES": 16, "RUN": 8, "CHANNELS": 32, "num_warps": 8}
STEP = {"CHANNELS": 128, "num_warps": 4}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `causal_conv1d` has checked them; returns y and the final states.

    Raises:
        ValueError: the width is not supported.
    """
    check_width(weight)
    return _differentiable(x, weight, bias, seq_idx, initial_states, activation is not None)


def conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Arguments as `causal_conv1d_step` has checked them; `conv_state` is updated in place.

    Raises:
        ValueError: the width is not supported.
    """
    check_width(weight)
    older = conv_state.shape[2] - weight.shape[1] + 1  # tokens that the kernel does not look at
    _move_on(conv_state, older, conv_state_indices)
    seen = conv_state[:, :, older:]
    return _in_place(x, seen, weight, bias, conv_state_indices, activation is not None)


def _move_on(conv_state: Tensor, count: int, rows: Tensor | None) -> None:
    """Move the oldest `count` tokens of the rows in use on by one, before a step of the others."""
    if count == 0:
        return
    if rows is None:
        conv_state[:, :, :count] = conv_state[:, :, 1 : count + 1].clone()
    else:
        rows = rows[rows >= 0]
        conv_state[rows, :, :count] = conv_state[rows, :, 1 : count + 1]


def check_width(weight: Tensor) -> None:
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"weight: expected a width of at most {MAX_WIDTH} with backend 'fused', "
            f"got {weight.shape[1]}"
        )


@triton.jit
def _token(x, history, history_token, t, length, inside, W: tl.constexpr, ACC: tl.constexpr):
    """Tokens t [I] at x [I C], those before the first from the history, zeros elsewhere."""
    t = t[:, None]
    v = tl.load(x, inside & (t >= 0) & (t < length), other=0.0).to(ACC)
    if history is not None:
        at = history + (t + W - 1) * history_token
        v += tl.load(at, inside & (t < 0) & (t >= 1 - W), other=0.0).to(ACC)
    return v


@triton.jit
def _sum(xs, docs, s, taps, bias, c, channels, W: tl.constexpr, ACC: tl.constexpr):
    """The convolution at token s of each lane before the activation, [I C]."""
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
    """The documents of tokens t [I]; before the first token stands the first token's."""
    t = tl.minimum(tl.maximum(t, 0), length - 1)
    return tl.load(seq + t)


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
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
    blocks = tl.cdiv(length, LANES * RUN)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * (LANES * RUN)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)  # [C]
    inside = (c < channels)[None, :]
    run = tl.arange(0, LANES) * RUN
    lane = start + run  # [I] its first token
    x0 = x + batch * x_batch * UNIT + c[None, :] * x_channel  # [1 C] the first token
    x = x0 + start.to(tl.int64) * x_token * UNIT + run[:, None] * x_token * UNIT  # [I C]
    y += batch * y_batch * UNIT + c[None, :] * y_channel
    y += start.to(tl.int64) * y_token * UNIT + run[:, None] * y_token * UNIT
    if history is not None:
        history += batch * history_batch + c[None, :] * history_channel
    if seq is not None:
        seq += batch * length
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + c * W + k, c < channels, other=0.0).to(ACC)[None, :],)

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


@triton.jit(do_not_specialize=["length"])
def _backward_kernel(
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
    first = 0 if history is None else 1 - W  # the history's tokens are tokens like the others
    blocks = tl.cdiv(length - first, LANES * RUN)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    start = first + tl.program_id(0) % blocks * (LANES * RUN)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)  # [C]
    inside = (c < channels)[None, :]
    run = tl.arange(0, LANES) * RUN
    lane = start + run  # [I] its first token
    x += batch * x_batch * UNIT + start.to(tl.int64) * x_token * UNIT
    x += c[None, :] * x_channel + run[:, None] * x_token * UNIT  # [I C]
    dy += batch * dy_batch * UNIT + start.to(tl.int64) * dy_token * UNIT
    dy += c[None, :] * dy_channel + run[:, None] * dy_token * UNIT
    dx += batch * dx_batch * UNIT + start.to(tl.int64) * dx_token * UNIT
    dx += c[None, :] * dx_channel + run[:, None] * dx_token * UNIT
    state = (batch * channels + c[None, :]) * (W - 1)
    if history is not None:
        history += batch * history_batch + c[None, :] * history_channel
    if seq is not None:
        seq += batch * length
    taps, dtaps = (), ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + c * W + k, c < channels, other=0.0).to(ACC)[None, :],)
        dtaps += (tl.zeros([LANES, CHANNELS], ACC),)
    dbias = tl.zeros([LANES, CHANNELS], ACC)

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
            v = _sum(xs, docs, s, taps, bias, c, channels, W, ACC)
            sigmoid = tl.sigmoid(v)
            g *= sigmoid * (1 + v * (1 - sigmoid))
        done += (g,)
        if s < RUN:
            dbias += g
            total = ()
            for k in tl.static_range(W):
                term = g * xs[s + k]
                if seq is not None and k < W - 1:
                    term = tl.where((docs[s + k] == docs[s + W - 1])[:, None], term, 0)
                total += (dtaps[k] + term,)
            dtaps = total
        if s >= W - 1:  # the token W - 1 places before has all it gets
            d = done[s - W + 1] * taps[W - 1]
            for k in tl.static_range(1, W):
                term = done[s - W + 1 + k] * taps[W - 1 - k]
                if seq is not None:
                    term = tl.where((docs[s] == docs[s + k])[:, None], term, 0)
                d += term
            t = lane[:, None] + (s - W + 1)
            if dfinal is not None:
                j = t - (length - W + 1)  # [I 1]
                last = (j >= 0) & (j < W - 1)
                if seq is not None:
                    last &= (docs[s] == tl.load(seq + length - 1))[:, None]
                d += tl.load(dfinal + state + j, inside & last, other=0.0).to(ACC)
            here = inside & (t >= 0) & (t < length)
            tl.store(dx + (s - W + 1) * dx_token * UNIT, d.to(dx.dtype.element_ty), here)
            if history is not None and s < 2 * (W - 1):
                j = t + W - 1
                tl.store(dhistory + state + j, d.to(dhistory.dtype.element_ty), inside & (t < 0))

    partial += tl.program_id(0).to(tl.int64) * ((W + 1) * channels) + c
    for k in tl.static_range(W):
        tl.store(partial + k * channels, tl.sum(dtaps[k], 0), c < channels)
    tl.store(partial + W * channels, tl.sum(dbias, 0), c < channels)


@triton.jit
def _step_kernel(
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
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)  # [C]
    inside = c < channels
    row = batch if indices is None else tl.load(indices + batch).to(tl.int64)
    used = row + c * 0 >= 0  # -1 is padding
    state += row * state_row + c * state_channel
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


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _near(t: Tensor) -> Tensor:
    """t itself if a block of its tokens spans less than 2^31 elements."""
    return t if t.stride(2) < 2**22 else t.contiguous()


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides over batch, channels and tokens, those of batch and tokens in a unit; and the unit.

    A kernel that knows the unit reads several channels at once, though a projection's width is
    often a multiple of 8 but not of the 16 that Triton looks for.
    """
    unit = common_unit(*(t.stride(dim) for t in tensors for dim in (0, 2)))
    strides = []
    for t in tensors:
        batch, channel, token = t.stride()
        strides += [batch // unit, channel, token // unit]
    return strides, unit


def _accumulator(*tensors: Tensor | None) -> tl.dtype:
    return tl.float64 if accumulator(*tensors) == torch.float64 else tl.float32


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    batch, channels, length = x.shape
    weight, bias, seq_idx = _contiguous(weight, bias, seq_idx)
    y, final = _empty_outputs(x, weight)
    x = _near(x)
    if x.numel() == 0:
        return y, final
    blocks = ceil_divide(length, FORWARD["LANES"] * FORWARD["RUN"])
    grid = (batch * blocks, ceil_divide(channels, FORWARD["CHANNELS"]))
    history = (0, 0, 0) if initial_states is None else initial_states.stride()
    strides, unit = _strides(x, y)
    with torch.cuda.device_of(x):
        *tile, warps = FORWARD.values()
        acc = _accumulator(x, weight, bias, initial_states)
        launcher(_forward_kernel, (weight.shape[1], activation, *tile, unit, acc), warps)(
            grid,
            (x, weight, bias, seq_idx, initial_states, y, final),
            (channels, length, *history, *strides),
        )
    return y, final


def _empty_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], weight.shape[1] - 1)
    return empty_like(x), torch.empty(shape, dtype=x.dtype, device=x.device)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial states; that of x goes to `dx`, if given."""
    batch, channels, length = x.shape
    acc = accumulator(x, weight, bias, initial_states)
    taps, shift, seq_idx, dfinal = _contiguous(weight, bias, seq_idx, dfinal)
    dx = empty_like(x) if dx is None else dx
    dweight, dbias, dhistory = _empty_gradients(weight, bias, initial_states, like=x)
    width = weight.shape[1]
    tokens = length if initial_states is None else length + width - 1
    blocks = ceil_divide(tokens, BACKWARD["LANES"] * BACKWARD["RUN"])
    shape = (batch * blocks, width + 1, channels)
    partial = torch.empty(shape, dtype=acc, device=x.device)
    x, dy = _near(x), _near(dy)
    if x.numel() > 0:
        grid = (batch * blocks, ceil_divide(channels, BACKWARD["CHANNELS"]))
        history = (0, 0, 0) if initial_states is None else initial_states.stride()
        strides, unit = _strides(x, dy, dx)
        with torch.cuda.device_of(x):
            *tile, warps = BACKWARD.values()
            dtype = _accumulator(x, weight, bias, initial_states)
            launcher(_backward_kernel, (width, activation, *tile, unit, dtype), warps)(
                grid,
                (x, taps, shift, seq_idx, initial_states, dy, dfinal, dx, dhistory, partial),
                (channels, length, *history, *strides),
            )
    total = partial.sum(0)
    dweight.copy_(total[:width].t())
    if bias is not None:
        dbias.copy_(total[width])
    return dx, dweight, dbias, dhistory


def _empty_gradients(*tensors: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """Contiguous; of no elements for an argument that was not given, since an operator in torch's
    library returns no None."""
    return tuple(
        like.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in tensors
    )


_conv = torch.library.custom_op("ysnake::conv", _forward, mutates_args=())
_conv_backward = torch.library.custom_op(
    "ysnake::conv_backward",
    lambda *arguments: _backward(*arguments),
    mutates_args=(),
    schema="(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? initial_states, bool activation) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_conv.register_fake
def _(x, weight, bias, seq_idx, initial_states, activation):
    return _empty_outputs(x, weight)


@_conv_backward.register_fake
def _(dy, dfinal, x, weight, bias, seq_idx, initial_states, activation):
    return empty_like(x), *_empty_gradients(weight, bias, initial_states, like=x)


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, backward, dy, dfinal):
    tensors = ctx.saved_tensors
    x, _, bias, _, initial_states = tensors
    if dy is None:
        dy = x.new_zeros(1).expand(x.shape)
    dx, dweight, dbias, dhistory = backward(dy, dfinal, *tensors, ctx.activation)
    dbias = None if bias is None else dbias
    dhistory = None if initial_states is None else dhistory
    return dx, dweight, dbias, None, dhistory, None


_differentiable = Differentiable(_conv, _forward, _save, _differentiate, _conv_backward, _backward)


def _step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor | None,
    activation: bool,
) -> Tensor:
    batch, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    acc = _accumulator(x, weight, bias, conv_state)
    weight, bias, indices = _contiguous(weight, bias, indices)
    with torch.cuda.device_of(x):
        block, warps = STEP.values()
        launcher(_step_kernel, (weight.shape[1], activation, block, acc), warps)(
            (batch, ceil_divide(channels, block)),
            (x, conv_state, weight, bias, indices, y),
            (channels, *x.stride(), *conv_state.stride()),
        )
    return y


_conv_step = torch.library.custom_op("ysnake::conv_step", _step, mutates_args=("conv_state",))


@_conv_step.register_fake
def _(x, conv_state, weight, bias, indices, activation):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_in_place = InPlace(_conv_step, _step, written=1)
