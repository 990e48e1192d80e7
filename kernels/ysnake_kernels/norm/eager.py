"""Gated RMSNorm in pure torch, a block of rows at a time, its gradient written by hand.

A block's temporaries stay in the cache. Backward recomputes from the inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.numerics import accumulator

BLOCK_ELEMENTS = 128 * 1024  # of a temporary: half a megabyte in float32


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """Arguments as `rms_norm_gated` has checked them."""
    return _Norm.apply(x, weight, bias, z, (eps, group_size, norm_before_gate))


def _rows(*tensors: Tensor | None) -> list[list[Tensor | None]]:
    """The tensors as [rows features] views or copies, cut into the same blocks of rows."""
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors]
    rows, features = flat[0].shape
    size = max(1, BLOCK_ELEMENTS // features)
    spans = [slice(s, s + size) for s in range(0, rows, size)]
    return [[None if t is None else t[span] for t in flat] for span in spans]


def _normalised(v: Tensor, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    """v / rms(v), [rows features], and 1 / rms(v), [rows groups 1]."""
    groups = v.unflatten(-1, (-1, group_size))
    rstd = groups.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (groups * rstd).flatten(-2), rstd


class _Norm(torch.autograd.Function):
    """Saves its inputs; recomputes everything else in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, z, options):
        ctx.save_for_backward(x, weight, bias, z)
        ctx.options = options
        eps, group_size, norm_before_gate = options
        acc = accumulator(x, weight, bias, z)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for xb, zb, yb in _rows(x, z, y):
            v = xb.to(acc)
            gate = None if zb is None else F.silu(zb.to(acc))
            if gate is not None and not norm_before_gate:
                v = v * gate
            v = _normalised(v, eps, group_size)[0].mul_(weight.to(acc))
            if bias is not None:
                v += bias.to(acc)
            if gate is not None and norm_before_gate:
                v *= gate
            yb.copy_(v)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, z = ctx.saved_tensors
        eps, group_size, norm_before_gate = ctx.options
        acc = accumulator(x, weight, bias, z)
        w = weight.to(acc)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dw, db = torch.zeros_like(w), torch.zeros_like(w)
        for xb, zb, gb, dxb, dzb in _rows(x, z, dy, dx, dz):
            xb, grad = xb.to(acc), gb.to(acc)
            v = xb
            if zb is not None:
                zb = zb.to(acc)
                sigmoid = torch.sigmoid(zb)
                gate = zb * sigmoid
                slope = sigmoid * (1 + zb * (1 - sigmoid))  # of silu
                if not norm_before_gate:
                    v = xb * gate
            unit, rstd = _normalised(v, eps, group_size)
            if zb is not None and norm_before_gate:
                affine = unit * w if bias is None else (unit * w).add_(bias.to(acc))
                dzb.copy_(affine.mul_(grad).mul_(slope))
                grad = grad * gate
            dw += (grad * unit).sum(0)
            if bias is not None:
                db += grad.sum(0)
            # through v / rms(v): remove the part of the gradient along v
            g = (grad * w).unflatten(-1, (-1, group_size))
            u = unit.unflatten(-1, (-1, group_size))
            dv = ((g - u * (g * u).mean(-1, keepdim=True)) * rstd).flatten(-2)
            if zb is not None and not norm_before_gate:
                dzb.copy_(xb.mul(dv).mul_(slope))
                dv = dv.mul_(gate)
            dxb.copy_(dv)
        db = None if bias is None else db.to(bias.dtype)
        return dx, dw.to(weight.dtype), db, dz, None
