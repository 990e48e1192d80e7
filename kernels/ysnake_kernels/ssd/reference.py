"""The definition of the SSD scan: a loop over time, differentiated by autograd."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from ysnake_kernels.numerics import finite_rates, step_sizes
from ysnake_kernels.ssd.inputs import ScanInputs
from ysnake_kernels.ssd.sequences import scan_each


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y and the final states, of inputs that `ssd_scan` has checked; chunk_size has no effect."""
    if inputs.cu_seqlens is not None:
        return scan_each(scan, inputs)
    x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx = inputs[:10]
    batch, length, heads, head_dim = x.shape
    acc = inputs.accumulator
    xs = x.to(acc)
    dt = step_sizes(dt, dt_bias, inputs.dt_softplus, inputs.dt_limit, acc)
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
