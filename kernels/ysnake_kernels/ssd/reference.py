"""The definition of the SSD scan: a loop over time, differentiated by autograd."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from ysnake_kernels.numerics import accumulator, finite_rates, step_sizes


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Arguments as `ssd_scan` has checked them; chunk_size has no meaning here."""
    batch, length, heads, head_dim = x.shape
    acc = accumulator(x, dt, A, B, C, D, z, dt_bias, initial_states)
    xs = x.to(acc)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, acc)
    decay = torch.exp(dt * finite_rates(A.to(acc)))
    per_group = heads // B.shape[2]
    B, C = (repeat(t.to(acc), "b l g n -> b l (g r) n", r=per_group) for t in (B, C))

    if initial_states is None:
        S = xs.new_zeros(batch, heads, head_dim, B.shape[-1])
    else:
        S = initial_states.to(acc)
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same_document = seq_idx[:, t] == seq_idx[:, t - 1]
            S = torch.where(rearrange(same_document, "b -> b 1 1 1"), S, torch.zeros_like(S))
        update = einsum(dt[:, t], xs[:, t], B[:, t], "b h, b h p, b h n -> b h p n")
        S = rearrange(decay[:, t], "b h -> b h 1 1") * S + update
        ys.append(einsum(S, C[:, t], "b h p n, b h n -> b h p"))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + xs * (D.to(acc) if D.ndim == 2 else rearrange(D.to(acc), "h -> h 1"))
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype), S.clone()  # a caller may change it in place; the last y needs it as it is
