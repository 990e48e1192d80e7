"""One recurrent step of the SSD layer in pure torch: two passes over the state, both in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.numerics import accumulator, finite_rates, step_sizes
from ysnake_kernels.step.inputs import StepInputs


def step(inputs: StepInputs) -> Tensor:
    """y of `ssd_step`, for inputs that it has checked; their state is updated in place."""
    state, x, B, C, D = inputs.state, inputs.x, inputs.B, inputs.C, inputs.D
    indices, z = inputs.indices, inputs.z
    acc = accumulator(state, x)
    batch, groups, n = B.shape
    xs = x.to(acc)
    limits = inputs.dt_softplus, inputs.dt_limit
    dt = step_sizes(inputs.dt, inputs.dt_bias, *limits, acc)  # [b h]
    S = state if indices is None else state[indices]
    S = S.to(acc)
    S.mul_(torch.exp(dt * finite_rates(inputs.A.to(acc)))[..., None, None])
    rows = S.shape[1] // groups * S.shape[2]  # of the state, for each group
    S.view(batch, groups, rows, n).addcmul_(
        (xs * dt[..., None]).reshape(batch, groups, rows, 1), B.to(acc)[:, :, None]
    )
    y = read_state(S, C.to(acc))
    if indices is not None:
        state[indices] = S.to(state.dtype)
    elif S is not state:
        state.copy_(S)
    if D is not None:
        y = y.addcmul_(xs, D.to(acc) if D.ndim == 2 else D.to(acc)[:, None])
    if z is not None:
        y = y.mul_(F.silu(z.to(acc)))
    return y.to(x.dtype)


def read_state(S: Tensor, C: Tensor) -> Tensor:
    """S C for each head, (batch, heads, P), of S (batch, heads, P, N) and C (batch, groups, N)."""
    _, heads, head_dim, n = S.shape
    # the product C S^T for each head: in the order S C it takes up to ten times as long
    C = C.unsqueeze(2).expand(-1, -1, heads // C.shape[1], -1).reshape(-1, 1, n)
    return torch.bmm(C, S.view(-1, head_dim, n).transpose(1, 2)).view(S.shape[:3])
