"""The convolution on a GPU: launches of the Triton kernels, operators and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ysnake_kernels.conv.fused_kernels import backward_kernel, forward_kernel, step_kernel
from ysnake_kernels.conv.inputs import ConvInputs
from ysnake_kernels.custom_op import Differentiable, InPlace, empty_gradients
from ysnake_kernels.memory import empty_like
from ysnake_kernels.numerics import accumulator, ceil_divide, common_unit
from ysnake_kernels.triton_launch import contiguous, launcher, triton_accumulator

MAX_WIDTH = 4
# Used on every card. BACKWARD is the fastest on an H200. FORWARD spills no registers on sm_80.
FORWARD = {"LANES": 16, "RUN": 8, "CHANNELS": 64, "num_warps": 4}
BACKWARD = {"LANES": 16, "RUN": 8, "CHANNELS": 32, "num_warps": 8}
STEP = {"CHANNELS": 128, "num_warps": 4}


def conv(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y and the final states of `causal_conv1d`, for inputs that it has checked.

    Raises:
        ValueError: the width is not supported.
    """
    check_width(inputs.weight)
    return _differentiable(*inputs)


def conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    indices: Tensor | None,
) -> Tensor:
    """y of `causal_conv1d_step`, for checked arguments; `conv_state` is updated in place.

    Raises:
        ValueError: the width is not supported.
    """
    check_width(weight)
    return _in_place(x, conv_state, weight, bias, indices, silu)


def check_width(weight: Tensor) -> None:
    """Raise ValueError if the convolution is wider than the kernels allow."""
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"weight: expected a width of at most {MAX_WIDTH} with backend 'fused', "
            f"got {weight.shape[1]}"
        )


def _near(t: Tensor) -> Tensor:
    """t itself if a block of its tokens spans less than 2^31 elements."""
    return t if t.stride(2) < 2**22 else t.contiguous()


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides over batch, channels and tokens of each tensor, and a unit.

    The strides over batch and tokens are counted in this unit, which divides all of them. A kernel
    that knows the unit reads several channels at once. Triton by itself does so only for multiples
    of 16, and the width of a projection is often a multiple of 8 only.
    """
    unit = common_unit(*(t.stride(dim) for t in tensors for dim in (0, 2)))
    strides: list[int] = []
    for t in tensors:
        batch, channel, token = t.stride()
        strides += [batch // unit, channel, token // unit]
    return strides, unit


def forward(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y and the final states, without autograd."""
    x, weight, bias, seq_idx, initial_states, silu = inputs
    batch, channels, length = x.shape
    taps, bias, seq_idx = weight.contiguous(), contiguous(bias), contiguous(seq_idx)
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
        acc = triton_accumulator(x, weight, bias, initial_states)
        launcher(forward_kernel, (inputs.width, silu, *tile, unit, acc), warps)(
            grid,
            (x, taps, bias, seq_idx, initial_states, y, final),
            (channels, length, *history, *strides),
        )
    return y, final


def _empty_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], weight.shape[1] - 1)
    return empty_like(x), torch.empty(shape, dtype=x.dtype, device=x.device)


def backward(
    inputs: ConvInputs, dy: Tensor, dfinal: Tensor | None, dx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial states. That of x is written to `dx`, if given.

    If bias or initial states were not given, their gradient is an empty tensor.
    """
    x, weight, bias, seq_idx, initial_states, silu = inputs
    batch, channels, length = x.shape
    width, acc = inputs.width, accumulator(x, weight, bias, initial_states)
    taps, shift = weight.contiguous(), contiguous(bias)
    seq_idx, dfinal = contiguous(seq_idx), contiguous(dfinal)
    dx = empty_like(x) if dx is None else dx
    dweight, dbias, dhistory = empty_gradients(weight, bias, initial_states)
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
            dtype = triton_accumulator(x, weight, bias, initial_states)
            launcher(backward_kernel, (width, silu, *tile, unit, dtype), warps)(
                grid,
                (x, taps, shift, seq_idx, initial_states, dy, dfinal, dx, dhistory, partial),
                (channels, length, *history, *strides),
            )
    total = partial.sum(0)
    dweight.copy_(total[:width].t())
    if bias is not None:
        dbias.copy_(total[width])
    return dx, dweight, dbias, dhistory


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return forward(ConvInputs(x, weight, bias, seq_idx, initial_states, silu))


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(ConvInputs(x, weight, bias, seq_idx, initial_states, silu), dy, dfinal)


_conv = torch.library.custom_op("ysnake::conv", _forward, mutates_args=())
_conv_backward = torch.library.custom_op("ysnake::conv_backward", _backward, mutates_args=())


@_conv.register_fake
def _(x, weight, bias, seq_idx, initial_states, silu):
    return _empty_outputs(x, weight)


@_conv_backward.register_fake
def _(dy, dfinal, x, weight, bias, seq_idx, initial_states, silu):
    return empty_like(x), *empty_gradients(weight, bias, initial_states)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, backward: Callable, dy: Tensor | None, dfinal: Tensor | None) -> tuple:
    tensors = ctx.saved_tensors
    x, _, bias, _, initial_states = tensors
    if dy is None:
        dy = x.new_zeros(1).expand(x.shape)
    dx, dweight, dbias, dhistory = backward(dy, dfinal, *tensors, ctx.silu)
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
    silu: bool,
) -> Tensor:
    batch, channels = x.shape
    width = weight.shape[1]
    older = conv_state.shape[2] - width + 1  # tokens that no tap reads
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    acc = triton_accumulator(x, weight, bias, conv_state)
    taps, bias, indices = weight.contiguous(), contiguous(bias), contiguous(indices)
    with torch.cuda.device_of(x):
        block, warps = STEP.values()
        launcher(step_kernel, (width, older, silu, block, acc), warps)(
            (batch, ceil_divide(channels, block)),
            (x, conv_state, taps, bias, indices, y),
            (channels, *x.stride(), *conv_state.stride()),
        )
    return y


_conv_step = torch.library.custom_op("ysnake::conv_step", _step, mutates_args=("conv_state",))


@_conv_step.register_fake
def _(x, conv_state, weight, bias, indices, silu):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_in_place = InPlace(_conv_step, _step, written=1)
