"""The mixer on a GPU: the fused operators one after another, and their gradients in one tensor.

Backward computes again what lies between the operators, as `composed` does. Each operator writes
its gradient into its own part of the projection's gradient, so that none is copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.conv import fused as conv
from ysnake_kernels.mixer.composed import scan_inputs
from ysnake_kernels.norm import fused as norm
from ysnake_kernels.ssd import fused as scan
from ysnake_kernels.ssd import fused_backward, fused_forward
from ysnake_kernels.ssd.inputs import ScanInputs, SequenceGradients


def check_sizes(sizes: list[int], ngroups: int, conv_weight: Tensor, group_size: int) -> None:
    """Raise ValueError where one of the kernels cannot take these sizes."""
    d_inner, channels, heads = sizes
    conv.check_width(conv_weight)
    scan.check_sizes(d_inner // heads, (channels - d_inner) // (2 * ngroups))
    norm.check_group(group_size)


TENSORS = 12  # of the arguments of `Mixer`, the first ones


class Mixer(torch.autograd.Function):
    """Arguments and results as those of `composed.mixer`, tensors first.

    The norm's weight is not None. The output projection's weight and bias have the dtype in which
    it multiplies.
    """

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:TENSORS])
        ctx.options = arguments[TENSORS:]
        ctx.set_materialize_grads(False)
        found = Intermediates(*arguments)
        states = found.read()
        normed = found.norm()
        weight, bias = arguments[10:12]
        return (normed if weight is None else F.linear(normed, weight, bias)), states

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstates):
        found = Intermediates(*ctx.saved_tensors, *ctx.options)
        return *found.gradients(dout, dstates), *[None] * len(ctx.options)


class Intermediates:
    """The tensors that one operator gives to the next."""

    def __init__(
        self, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, conv_states, initial_states, seq_idx,
        norm_weight, out_weight, out_bias, sizes, ngroups, activation, scan_options, norm_options,
    ):  # fmt: skip
        self.zxbcdt, self.sizes, self.ngroups = zxbcdt, sizes, ngroups
        self.z, xBC, self.dt = zxbcdt.split(sizes, -1)
        self.convolution = (
            xBC.transpose(1, 2), conv_weight, conv_bias, seq_idx, conv_states,
            activation is not None,
        )  # fmt: skip
        small = (A, D, initial_states, dt_bias, seq_idx)
        self.small = [None if t is None else t.contiguous() for t in small]
        self.scan_options = scan_options
        self.norm_weight, self.norm_options = norm_weight, norm_options
        self.out_weight, self.out_bias = out_weight, out_bias

    def read(self) -> Tensor:
        """Convolution and scan; returns the final states."""
        mixed, _ = conv._forward(*self.convolution)
        x, B, C = scan_inputs(mixed.transpose(1, 2), self.sizes, self.ngroups)
        A, D, initial_states, dt_bias, seq_idx = self.small
        softplus, *limit = self.scan_options
        tensors = (x, self.dt, A, B, C, D, None, initial_states, dt_bias, seq_idx)
        self.scan = ScanInputs(*tensors, dt_softplus=softplus, dt_limit=tuple(limit))
        y, states = fused_forward.forward(self.scan)
        self.y = y.flatten(2)
        return states

    def norm(self) -> Tensor:
        weight = self.out_weight
        dtype = self.y.dtype if weight is None else weight.dtype
        given = (self.y, None, self.norm_weight, None, self.z, *self.norm_options, dtype)
        return norm.add_and_norm(*given)[1]

    def gradients(self, dout: Tensor | None, dstates: Tensor | None) -> list[Tensor | None]:
        """Of all tensors, from those of the output and of the final states."""
        self.read()
        if dout is None:
            features = len(self.out_weight) if self.out_weight is not None else self.y.shape[-1]
            dout = self.y.new_zeros(*self.y.shape[:-1], features)
        dout_weight = dout_bias = None
        if self.out_weight is not None:
            rows = dout.reshape(-1, len(self.out_weight))
            dout_weight = rows.t() @ self.norm().view(-1, self.out_weight.shape[1])
            dout_bias = None if self.out_bias is None else rows.sum(0)
            dout = (rows @ self.out_weight).view(self.y.shape)
        dzxbcdt = torch.empty_like(self.zxbcdt, memory_format=torch.contiguous_format)
        dz, dxBC, ddt = dzxbcdt.split(self.sizes, -1)
        dy, _, dnorm_weight, *_ = norm.gradients(
            dout, None, self.y, None, self.norm_weight, None, self.z, *self.norm_options, dz
        )
        del self.y, dout
        dmixed = torch.empty(dxBC.shape, dtype=dxBC.dtype, device=dxBC.device)
        dx, dB, dC = scan_inputs(dmixed, self.sizes, self.ngroups)
        dy = dy.view(dx.shape)
        if dstates is not None:
            dstates = dstates.contiguous()
        into = SequenceGradients(dx, ddt, dB, dC)
        found = fused_backward.backward(dy, dstates, self.scan, into)
        _, _, dA, _, _, dD, _, dinitial, ddt_bias = found
        del self.scan, dy
        given = (dmixed.transpose(1, 2), None, *self.convolution)
        _, dweight, dbias, dconv_states = conv._backward(*given, dxBC.transpose(1, 2))
        return [
            *(dzxbcdt, dweight, None if self.convolution[2] is None else dbias, ddt_bias, dA, dD),
            *(None if self.convolution[4] is None else dconv_states, dinitial, None),
            *(dnorm_weight, dout_weight, dout_bias),
        ]
