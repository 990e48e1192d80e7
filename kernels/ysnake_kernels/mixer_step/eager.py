"""The mixer for one token in pure torch, in few operations.

Decoding on a CPU spends its time on reading weights and on calling operators. So `prepare` lays the
weights out once, and `step` then takes about twenty operations.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.mixer_step.weights import MixerWeights
from ysnake_kernels.norm.eager import rms_norm_few_rows
from ysnake_kernels.numerics import finite_rates
from ysnake_kernels.step.eager import read_state

NO_LIMIT = (0.0, float("inf"))


class Prepared(NamedTuple):
    """The weights as `step` uses them, all in the dtype of the state."""

    taps: Tensor  # (width, channels), contiguous
    conv_bias: Tensor | None  # (channels,)
    dt_bias: Tensor  # (heads,)
    A: Tensor  # (heads,), finite
    D: Tensor  # (heads, 1)
    norm_weight: Tensor  # (d_inner,)
    eps: Tensor  # of no dimensions
    dt_limit: tuple[float, float] | None  # None where it limits nothing
    groups: int
    projection: list[int]  # the sizes of z, xBC and dt
    convolved: list[int]  # the sizes of x, B and C


def prepare(weights: MixerWeights, dtype: torch.dtype) -> Prepared:
    """The weights laid out for `step`, in the dtype of the state."""
    bias, sizes = weights.conv_bias, weights.sizes
    return Prepared(
        taps=weights.conv_weight.detach().to(dtype).t().contiguous(),
        conv_bias=None if bias is None else bias.detach().to(dtype),
        dt_bias=weights.dt_bias.detach().to(dtype),
        A=finite_rates(weights.A.detach().to(dtype)),
        D=weights.D.detach().to(dtype)[:, None],
        norm_weight=weights.norm_weight.detach().to(dtype),
        eps=weights.norm_weight.new_tensor(weights.eps, dtype=dtype),
        dt_limit=None if tuple(weights.dt_limit) == NO_LIMIT else weights.dt_limit,
        groups=sizes.groups,
        projection=sizes.projection,
        convolved=sizes.convolved,
    )


def step(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Prepared) -> Tensor:
    """`mixer_step` of checked arguments in one dtype. Both states are updated in place."""
    batch, heads, head_dim, n = ssm_state.shape
    z, xBC, dt = zxbcdt.split_with_sizes(weights.projection, 1)

    before = conv_state.transpose(1, 2)
    window = torch.cat([before, xBC[:, None]], 1)  # [batch width channels]
    before.copy_(window[:, 1:])
    xBC = window.mul_(weights.taps).sum(1)
    if weights.conv_bias is not None:
        xBC += weights.conv_bias
    x, B, C = F.silu(xBC, inplace=True).split_with_sizes(weights.convolved, 1)

    dt = F.softplus(dt + weights.dt_bias)
    if weights.dt_limit is not None:
        dt = dt.clamp_(*weights.dt_limit)
    x = x.view(batch, heads, head_dim)
    B, C = B.view(batch, weights.groups, n), C.view(batch, weights.groups, n)
    y = recur(ssm_state, x, dt, weights.A, B, C)
    y = y.addcmul_(x, weights.D).view(batch, heads * head_dim).mul_(F.silu(z))
    return rms_norm_few_rows(y, weights.norm_weight, weights.eps, weights.groups)


def recur(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """S' = exp(dt A) S + dt x B^T, in place, and S' C (batch, heads, P).

    Args:
        state: S (batch, heads, P, N), contiguous.
        x: (batch, heads, P).
        dt: (batch, heads).
        A: (heads,).
        B, C: (batch, groups, N).
    """
    decay = torch.exp(dt * A)[..., None]
    batch, groups, n = B.shape
    of_each = state.shape[1] // groups * state.shape[2]
    rows = state.view(batch, groups, of_each, n)
    u = (x * dt[..., None]).view(batch, groups, of_each, 1)
    state.mul_(decay[..., None])
    rows.addcmul_(u, B.unsqueeze(2))
    return read_state(state, C)
