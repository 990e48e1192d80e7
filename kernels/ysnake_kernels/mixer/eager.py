"""The mixer in pure torch, as one function: what a CPU trains with.

Saves its arguments. Backward goes over the convolution once more and over the chunks of the scan
once forward, for the states, and once back; the norm and its gradient are taken chunk by chunk, so
that neither the scan's output nor its gradient ever exists as a whole. The gradients of z, of the
convolution's input and of dt are written where they belong in the gradient of zxbcdt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.backend import uncompiled
from ysnake_kernels.conv import eager as conv
from ysnake_kernels.mixer.composed import scan_inputs
from ysnake_kernels.norm import eager as norm
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd import eager as ssd


def mixer(*arguments) -> tuple[Tensor, Tensor | None]:
    """Arguments as `composed.mixer`'s without its first."""
    return uncompiled(_Mixer.apply)(*arguments)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        initial_states,
        seq_idx,
        norm_weight,
        out_weight,
        out_bias,
        sizes,
        ngroups,
        activation,
        scan_options,
        norm_options,
        return_states,
        dtype,
    ):
        ctx.save_for_backward(
            *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, initial_states, seq_idx),
            *(norm_weight, out_weight, out_bias),
        )
        ctx.options = sizes, ngroups, activation, scan_options, norm_options, dtype
        ctx.set_materialize_grads(False)
        z, xBC, dt = zxbcdt.split(sizes, dim=-1)
        mixed = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
        conv.forward(xBC, conv_weight, conv_bias, seq_idx, None, mixed, activation)
        x, B, C = scan_inputs(mixed, sizes, ngroups)
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)

        def finish(span: slice, y: Tensor) -> None:
            out[:, span] = _finished(y.flatten(2), z[:, span], norm_weight, norm_options)

        scan = (x, dt, A, B, C, D, initial_states, dt_bias, seq_idx, scan_options)
        states = ssd.forward(*scan, finish, return_states)
        if out_weight is not None:
            weights = (None if t is None else t.to(dtype) for t in (out_weight, out_bias))
            out = F.linear(out.to(dtype), *weights)
        return out, states

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstates):
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, *others = ctx.saved_tensors
        initial_states, seq_idx, norm_weight, out_weight, out_bias = others
        sizes, ngroups, activation, scan_options, norm_options, dtype = ctx.options
        z, xBC, dt = zxbcdt.split(sizes, dim=-1)
        dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
        dz, dxBC, ddt = dzxbcdt.split(sizes, dim=-1)
        out = dout_weight = dout_bias = None
        if dout is None:
            dout = torch.zeros_like(z)
        elif out_weight is not None:
            out = torch.empty(z.shape, dtype=dtype, device=z.device)
            dprojected, dout = dout, (dout.to(dtype) @ out_weight.to(dtype)).to(z.dtype)

        acc = accumulator(xBC, conv_weight, conv_bias)
        sums = torch.empty(xBC.shape, dtype=acc, device=xBC.device)
        mixed, dmixed = (torch.empty_like(sums, dtype=xBC.dtype) for _ in "xy")
        conv_arguments = (xBC, conv_weight, conv_bias, seq_idx, None)
        conv.forward(*conv_arguments, mixed, activation, sums)
        x, B, C = scan_inputs(mixed, sizes, ngroups)
        dx, dB, dC = scan_inputs(dmixed, sizes, ngroups)
        dnorm_weight = None
        if norm_weight is not None:
            dnorm_weight = torch.zeros_like(norm_weight, dtype=accumulator(z, norm_weight))

        def gradient(span: slice, y) -> Tensor:
            yc, zc, grad = y().flatten(2), z[:, span], dout[:, span]
            if norm_weight is not None:
                dy, dz[:, span], done = norm.backward(
                    yc, norm_weight, None, zc, grad, dnorm_weight, None, *norm_options, want_y=True
                )
            else:
                zc, grad = zc.to(yc.dtype), grad.to(yc.dtype)
                gate = F.silu(zc)
                dz[:, span] = torch.ops.aten.silu_backward(grad * yc, zc)
                dy, done = grad * gate, yc * gate
            if out is not None:
                out[:, span] = done
            return dy.unflatten(2, (sizes[2], -1))

        scan = (x, dt, A, B, C, D, initial_states, dt_bias, seq_idx, scan_options)
        dA, dD, dinitial, ddt_bias = ssd.backward(*scan, gradient, dstates, dx, ddt, dB, dC)
        dconv = conv.backward(*conv_arguments, dmixed, dxBC, activation, sums)
        if out is not None:
            rows = dprojected.flatten(0, -2)
            dout_weight = (rows.to(dtype).t() @ out.flatten(0, 1)).to(out_weight.dtype)
            dout_bias = None if out_bias is None else rows.sum(0).to(out_bias.dtype)
        if norm_weight is not None:
            dnorm_weight = dnorm_weight.to(norm_weight.dtype)
        grads = (dzxbcdt, *dconv[:2], ddt_bias, dA, dD, dinitial, None)
        return *grads, dnorm_weight, dout_weight, dout_bias, *([None] * 7)


def _finished(y: Tensor, z: Tensor, weight: Tensor | None, norm_options: tuple) -> Tensor:
    """The norm and the gate, or the gate alone."""
    if weight is None:
        return y * F.silu(z.to(y.dtype))
    return norm.forward(y, weight, None, z, *norm_options)
