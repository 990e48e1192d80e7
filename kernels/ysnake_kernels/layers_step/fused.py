"""One token through all layers on a GPU: torch's projections, and Triton kernels between them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.layers_step.fused_kernels import join_kernel, mix_kernel
from ysnake_kernels.layers_step.inputs import LayersInputs, LayerWeights
from ysnake_kernels.mixer_step import check_mixer_step
from ysnake_kernels.mixer_step.weights import MixerWeights
from ysnake_kernels.numerics import ceil_divide, common_unit, next_power_of_2
from ysnake_kernels.triton_launch import contiguous, launcher, triton_accumulator

MAX_STATE = 1024  # N, which a program holds for each of its rows
MAX_FEATURES = 16384  # d_model, which a program holds for one row of the batch


class Tile(NamedTuple):
    """What a program of the recurrence computes."""

    elements: int  # of the state at a time
    tiles: int  # one after the other
    warps: int


class Mixed(NamedTuple):
    """What a layer leaves for the kernel that adds it to the residual stream."""

    out: Tensor  # (batch, d_model), before the division by the rms
    squares: Tensor  # (batch, parts), whose sum gives the rms
    projected: Tensor  # (batch, features)
    conv_state: Tensor
    layer: LayerWeights


def tile(heads: int) -> Tile:
    """The tile of the recurrence, on any architecture, for this many heads of all rows."""
    return Tile(2048, 1 if heads < 256 else 2, 4)  # the fastest of 20 on an H200


def fits(inputs: LayersInputs) -> bool:
    """Whether the kernels take these layers.

    They do not take float16: a row can overflow before it is divided by its rms.
    """
    sizes = [weights.mixer.sizes for weights in inputs.layers]
    small = all(s.groups == 1 and s.state <= MAX_STATE for s in sizes)
    wide = all(weights.in_weight.dtype != torch.float16 for weights in inputs.layers)
    return small and wide and inputs.h.shape[1] <= MAX_FEATURES


def step(inputs: LayersInputs) -> Tensor:
    """`layers_step` of checked arguments.

    Raises:
        ValueError, TypeError: a state or a weight of a mixer is wrong.
    """
    h, states, layers, norm_weight, eps = inputs
    if h.numel() == 0:
        return h.to(norm_weight.dtype)
    mixed = None
    with torch.cuda.device_of(h):
        for w, own in zip(layers, states, strict=True):
            normed = join(h, mixed, w.norm_weight, w.eps, w.in_weight.dtype)
            projected = F.linear(normed, w.in_weight, w.in_bias)
            check_mixer_step(projected, *own, w.mixer)
            y, squares = mix(projected, *own, w.mixer)
            out = F.linear(y, w.out_weight)
            mixed = Mixed(out, squares, projected, own[0], w)
        return join(h, mixed, norm_weight, eps, norm_weight.dtype)


def mix(
    projected: Tensor, conv_state: Tensor, ssm_state: Tensor, w: MixerWeights
) -> tuple[Tensor, Tensor]:
    """The gated output before its norm, with the norm's weight; and its sums of squares."""
    device = projected.device
    batch, heads, head_dim, n = ssm_state.shape
    elements, tiles, warps = tile(batch * heads)
    cols = next_power_of_2(n)
    rows = min(next_power_of_2(head_dim), max(1, elements // cols))
    tiles = min(tiles, ceil_divide(head_dim, rows))
    programs = ceil_divide(head_dim, rows * tiles)
    acc = triton_accumulator(ssm_state)
    y = torch.empty((batch, heads * head_dim), dtype=projected.dtype, device=device)
    squares = torch.empty((batch, heads * programs), dtype=ssm_state.dtype, device=device)
    per_head = [t.contiguous() for t in (w.dt_bias, w.A, w.D, w.norm_weight)]
    tensors = ssm_state, projected, conv_state, w.conv_weight, contiguous(w.conv_bias)
    unit, limits = common_unit(projected.shape[1]), map(float, w.dt_limit)
    sizes = heads, head_dim, n, w.conv_weight.shape[1]
    launcher(mix_kernel, (*sizes, *limits, unit, rows, cols, tiles, acc), warps)(
        (batch, heads, programs),
        (*tensors, *per_head, y, squares),
        (projected.shape[1] // unit, *conv_state.stride(), *w.conv_weight.stride()),
    )
    return y, squares


def join(
    h: Tensor, mixed: Mixed | None, norm_weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Add a layer's output to h in place, shift its conv_state, and return the norm of h."""
    batch, features = h.shape
    normed = torch.empty(h.shape, dtype=dtype, device=h.device)
    cols = next_power_of_2(features)
    warps = min(max(cols // 256, 4), 16)
    acc = triton_accumulator(h, norm_weight)
    out = squares = bias = projected = history = None
    numbers: tuple[float, ...] = (1e-5, 1, 1, 1, 2, 1)
    strides: tuple[int, ...] = (1, 1, 1, 1, 1)
    if mixed is not None:
        out, squares, projected, history, layer = mixed
        bias = contiguous(layer.out_bias)
        sizes, parts, unit = layer.mixer.sizes, squares.shape[1], common_unit(projected.shape[1])
        width = layer.mixer.conv_weight.shape[1]
        numbers = layer.mixer.eps, sizes.d_inner, parts, next_power_of_2(parts), width, unit
        strides = sizes.channels, projected.shape[1] // unit, *history.stride()
    launcher(join_kernel, (eps, *numbers, cols, acc), warps)(
        (batch, 1 if mixed is None else 2),
        (h, out, squares, bias, norm_weight.contiguous(), normed, projected, history),
        (features, *strides),
    )
    return normed
