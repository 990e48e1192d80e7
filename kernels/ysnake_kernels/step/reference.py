"""The definition of one recurrent step of the SSD layer."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from ysnake_kernels.numerics import accumulator, finite_rates, step_sizes


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    state_batch_indices: Tensor | None,
) -> Tensor:
    """Arguments as `ssd_step` has checked them; `state` is updated in place."""
    acc = accumulator(state, x)
    xs = x.to(acc)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, acc)
    per_group = x.shape[1] // B.shape[1]
    B, C = (repeat(t.to(acc), "b g n -> b (g r) n", r=per_group) for t in (B, C))
    decay = rearrange(torch.exp(dt * finite_rates(A.to(acc))), "b h -> b h 1 1")
    rows = slice(None) if state_batch_indices is None else state_batch_indices
    S = decay * state[rows].to(acc) + einsum(dt, xs, B, "b h, b h p, b h n -> b h p n")
    state[rows] = S.to(state.dtype)
    y = einsum(S, C, "b h p n, b h n -> b h p")
    if D is not None:
        y = y + xs * (D.to(acc) if D.ndim == 2 else rearrange(D.to(acc), "h -> h 1"))
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype)
