"""The definition of Mamba-1's selective scan: a loop over time, differentiated by autograd."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from ysnake_kernels.numerics import finite_rates


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the last state of `selective_scan`.

    dt are the step sizes after bias and softplus. B and C are (batch, groups, N, length).
    """
    batch, channels, length = u.shape
    acc = dt.dtype
    us, A = u.to(acc), finite_rates(A.to(acc))
    per_group = channels // B.shape[1]
    B, C = (repeat(t.to(acc), "b g n l -> b (g r) n l", r=per_group) for t in (B, C))

    S = us.new_zeros(batch, channels, A.shape[1])
    ys = []
    for t in range(length):
        decay = torch.exp(einsum(dt[:, :, t], A, "b d, d n -> b d n"))
        S = decay * S + einsum(dt[:, :, t], us[:, :, t], B[:, :, :, t], "b d, b d, b d n -> b d n")
        ys.append(einsum(S, C[:, :, :, t], "b d n, b d n -> b d"))
    y = torch.stack(ys, dim=2)
    if D is not None:
        y = y + us * rearrange(D.to(acc), "d -> d 1")
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(u.dtype), S.clone()  # a caller may change it in place
