"""The definition of one recurrent step of the SSD layer."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from ysnake_kernels.numerics import accumulator, finite_rates, step_sizes
from ysnake_kernels.step.inputs import StepInputs


def step(inputs: StepInputs) -> Tensor:
    """y of `ssd_step`, for inputs that it has checked; their state is updated in place."""
    i, x, state = inputs, inputs.x, inputs.state
    acc = accumulator(state, x)
    xs = x.to(acc)
    dt = step_sizes(i.dt, i.dt_bias, i.dt_softplus, i.dt_limit, acc)
    per_group = x.shape[1] // i.B.shape[1]
    B, C = (repeat(t.to(acc), "b g n -> b (g r) n", r=per_group) for t in (i.B, i.C))
    decay = rearrange(torch.exp(dt * finite_rates(i.A.to(acc))), "b h -> b h 1 1")
    rows = slice(None) if i.indices is None else i.indices
    S = decay * state[rows].to(acc) + einsum(dt, xs, B, "b h, b h p, b h n -> b h p n")
    state[rows] = S.to(state.dtype)
    y = einsum(S, C, "b h p n, b h n -> b h p")
    if i.D is not None:
        y = y + xs * (i.D.to(acc) if i.D.ndim == 2 else rearrange(i.D.to(acc), "h -> h 1"))
    if i.z is not None:
        y = y * F.silu(i.z.to(acc))
    return y.to(x.dtype)
