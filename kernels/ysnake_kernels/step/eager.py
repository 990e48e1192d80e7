"""One recurrent step of the SSD layer in pure torch: two passes over the state, both in place."""

import torch
import torch.nn.functional as F
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
    batch = x.shape[0]
    groups, n = B.shape[1:]
    xs = x.to(acc)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, acc)  # [b h]
    S = state if state_batch_indices is None else state[state_batch_indices]
    S = S.to(acc)
    S.mul_(torch.exp(dt * finite_rates(A.to(acc)))[..., None, None])
    S.view(batch, groups, -1, n).addcmul_(
        (xs * dt[..., None]).reshape(batch, groups, -1, 1), B.to(acc)[:, :, None]
    )
    # C S^T for each head: S C takes up to ten times as long
    C = C.to(acc)[:, :, None].expand(-1, -1, x.shape[1] // groups, -1).reshape(-1, 1, n)
    y = torch.bmm(C, S.view(-1, x.shape[2], n).transpose(1, 2)).view(x.shape)
    if state_batch_indices is not None:
        state[state_batch_indices] = S.to(state.dtype)
    elif S is not state:
        state.copy_(S)
    if D is not None:
        y = y.addcmul_(xs, D.to(acc) if D.ndim == 2 else D.to(acc)[:, None])
    if z is not None:
        y = y.mul_(F.silu(z.to(acc)))
    return y.to(x.dtype)
