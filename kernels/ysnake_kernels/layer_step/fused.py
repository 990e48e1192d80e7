"""One token through a whole layer on a GPU: launches of the three Triton kernels."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ysnake_kernels.layer_step.fused_kernels import join_kernel, mix_kernel, project_kernel
from ysnake_kernels.layer_step.weights import LayerWeights
from ysnake_kernels.numerics import ceil_divide, common_unit, next_power_of_2
from ysnake_kernels.triton_launch import launcher
from ysnake_kernels.triton_products import arithmetic, family_and_processors, tf32_is_allowed

MAX_STATE = 1024  # N; a program holds at least four rows of a head's state


class Tile(NamedTuple):
    """What a program of a projection computes, and how it waits."""

    rows: int  # of the batch
    cols: int  # outputs
    depth: int  # inputs at a time
    warps: int
    stages: int


class StateTile(NamedTuple):
    """What a program of the recurrence computes."""

    elements: int  # of the state
    warps: int


def project_tile(batch: int) -> Tile:
    """The tile of the input projection, on any architecture."""
    return Tile(_rows(batch, 64), 32, 128, 4, 3)


def join_tile(batch: int) -> Tile:
    """The tile of the output projection, on any architecture."""
    return Tile(_rows(batch, 32), 16, 128, 4, 4)


def state_tile(batch: int) -> StateTile:
    """The tile of the recurrence, on any architecture."""
    return StateTile(2048, 4)


def _rows(batch: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(batch)))


def fits(weights: LayerWeights) -> bool:
    """Whether the kernels take a mixer of these sizes."""
    return weights.mixer.sizes.state <= MAX_STATE


def step(
    h: Tensor, projected: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: LayerWeights
) -> None:
    """`layer_step` of checked arguments; `projected` is memory for what the input projects to."""
    if h.numel() == 0:
        return
    how = numbers(h.device, projected.dtype)
    with torch.cuda.device_of(h):
        _project(h, projected, weights, how)
        y, squares = _mix(projected, conv_state, ssm_state, weights)
        _join(h, y, squares, projected, conv_state, weights, how)


def numbers(device: torch.device, dtype: torch.dtype) -> tuple:
    """In which dtypes, and how exactly, the kernels multiply weights of this dtype."""
    exact = dtype in (torch.float32, torch.float16) and tf32_is_allowed()
    return arithmetic(family_and_processors(device)[0], exact, dtype, dtype, dtype)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _project(h: Tensor, projected: Tensor, w: LayerWeights, how: tuple) -> None:
    (batch, features), outputs = h.shape, projected.shape[1]
    tile = project_tile(batch)
    tensors = h, w.norm_weight.contiguous(), w.in_weight.contiguous(), _contiguous(w.in_bias)
    unit = common_unit(outputs)
    launcher(project_kernel, (w.eps, unit, *tile[:3], *how), tile.warps, tile.stages)(
        (ceil_divide(outputs, tile.cols), ceil_divide(batch, tile.rows)),
        (*tensors, projected),
        (batch, features, outputs, outputs // unit),
    )


def _mix(
    projected: Tensor, conv_state: Tensor, ssm_state: Tensor, w: LayerWeights
) -> tuple[Tensor, Tensor]:
    """The gated output before its norm, and its sums of squares."""
    mixer, device = w.mixer, projected.device
    batch, heads, head_dim, n = ssm_state.shape
    tile = state_tile(batch)
    cols = next_power_of_2(n)
    rows = min(next_power_of_2(head_dim), max(1, tile.elements // cols))
    tiles = ceil_divide(head_dim, rows)
    acc = tl.float64 if ssm_state.dtype == torch.float64 else tl.float32
    y = torch.empty((batch, heads * head_dim), dtype=projected.dtype, device=device)
    squares = torch.empty((batch, heads * tiles), dtype=ssm_state.dtype, device=device)
    per_head = (mixer.dt_bias, mixer.A, mixer.D, mixer.norm_weight)
    tensors = ssm_state, projected, conv_state, mixer.conv_weight, _contiguous(mixer.conv_bias)
    width, unit = mixer.conv_weight.shape[1], common_unit(projected.shape[1])
    sizes = heads, mixer.sizes.groups, head_dim, n, width
    limits = map(float, mixer.dt_limit)
    launcher(mix_kernel, (*sizes, *limits, unit, rows, cols, acc), tile.warps)(
        (batch, heads, tiles),
        (*tensors, *(t.contiguous() for t in per_head), y, squares),
        (projected.shape[1] // unit, *conv_state.stride(), *mixer.conv_weight.stride()),
    )
    return y, squares


def _join(
    h: Tensor,
    y: Tensor,
    squares: Tensor,
    projected: Tensor,
    conv_state: Tensor,
    w: LayerWeights,
    how: tuple,
) -> None:
    (batch, features), sizes, outputs = h.shape, w.mixer.sizes, projected.shape[1]
    tile = join_tile(batch)
    blocks = ceil_divide(features, tile.cols)
    parts = squares.shape[1] // sizes.groups
    unit = common_unit(outputs)
    norm = w.mixer.eps, sizes.groups, sizes.d_inner // sizes.groups, parts, next_power_of_2(parts)
    history = (
        w.mixer.conv_weight.shape[1],
        unit,
        next_power_of_2(ceil_divide(sizes.channels, blocks)),
    )
    tensors = h, y, squares, w.out_weight.contiguous(), _contiguous(w.out_bias)
    launcher(join_kernel, (*norm, *history, *tile[:3], *how), tile.warps, tile.stages)(
        (blocks, ceil_divide(batch, tile.rows)),
        (*tensors, projected, conv_state),
        (batch, features, outputs // unit, sizes.channels, *conv_state.stride()),
    )
