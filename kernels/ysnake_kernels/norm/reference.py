"""The definition of the gated RMSNorm, in a few lines differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.norm.inputs import NormInputs
from ysnake_kernels.numerics import accumulator


def norm(inputs: NormInputs, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm_gated` of inputs that it has checked."""
    x, weight, bias, z, eps, group_size, norm_before_gate = inputs
    acc = accumulator(x, weight, bias, z)
    y = x.to(acc)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(acc))
    groups = y.unflatten(-1, (-1, group_size))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(acc))
    return y.to(out_dtype)
