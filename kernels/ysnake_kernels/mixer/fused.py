"""The mixer on a GPU: the fused operators one after another, with all gradients in one tensor.

Backward computes the tensors between the operators again, as `composed` does. Each operator writes
its gradient into its own part of the projection's gradient, so no gradient is copied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.conv import fused as conv
from ysnake_kernels.custom_op import outside_autocast
from ysnake_kernels.mixer.inputs import TENSORS, MixerInputs
from ysnake_kernels.norm import fused as norm
from ysnake_kernels.ssd import fused as scan
from ysnake_kernels.ssd import fused_backward, fused_forward
from ysnake_kernels.ssd.inputs import ScanInputs, SequenceGradients


def mixer(inputs: MixerInputs) -> tuple[Tensor, Tensor]:
    """The output and the final states of checked inputs, which have a norm.

    Raises:
        ValueError: one of the kernels cannot take these sizes.
    """
    sizes, weight, bias = inputs.sizes, inputs.out_weight, inputs.out_bias
    conv.check_width(inputs.conv_weight)
    scan.check_sizes(sizes.head_dim, sizes.state)
    norm.check_group(sizes.d_inner // sizes.groups)
    if weight is not None:
        bias = None if bias is None else bias.to(inputs.dtype)
        inputs = inputs._replace(out_weight=weight.to(inputs.dtype), out_bias=bias)
    return _Mixer.apply(*inputs)


class _Mixer(torch.autograd.Function):
    """Saves its arguments. Those of the output projection are cast to the dtype of its product."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs = MixerInputs._make(arguments)
        ctx.save_for_backward(*inputs[:TENSORS])
        ctx.options = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        z, xBC, dt = inputs.sizes.split(inputs.zxbcdt)
        _, y, states = _scanned(inputs, xBC, dt)
        normed, weight = _normed(inputs, y, z), inputs.out_weight
        return (normed if weight is None else F.linear(normed, weight, inputs.out_bias)), states

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dstates: Tensor | None) -> tuple:
        inputs = MixerInputs._make((*ctx.saved_tensors, *ctx.options))
        return *_gradients(inputs, dout, dstates), *[None] * len(ctx.options)


def _scanned(inputs: MixerInputs, xBC: Tensor, dt: Tensor) -> tuple[ScanInputs, Tensor, Tensor]:
    """The inputs of the scan, its output [batch length d_inner], and the final states."""
    convolved, _ = conv.forward(inputs.convolution(xBC))
    given = inputs.scan(convolved.transpose(1, 2), dt)
    D, initial_states, dt_bias, seq_idx = (
        None if t is None else t.contiguous()
        for t in (given.D, given.initial_states, given.dt_bias, given.seq_idx)
    )
    given = given._replace(
        A=given.A.contiguous(),
        D=D,
        initial_states=initial_states,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
    )
    y, states = fused_forward.forward(given)
    return given, y.flatten(2), states


def _normed(inputs: MixerInputs, y: Tensor, z: Tensor) -> Tensor:
    """The gated norm of the scan's output, in the dtype of what follows."""
    dtype = y.dtype if inputs.out_weight is None else inputs.out_weight.dtype
    return norm.add_and_norm(inputs.norm(y, z), None, dtype)[1]


def _gradients(
    inputs: MixerInputs, dout: Tensor | None, dstates: Tensor | None
) -> list[Tensor | None]:
    """The gradients of all tensors of the inputs, from those of the output and final states."""
    sizes, weight = inputs.sizes, inputs.out_weight
    z, xBC, dt = sizes.split(inputs.zxbcdt)
    given, y, _ = _scanned(inputs, xBC, dt)
    if dout is None:
        features = sizes.d_inner if weight is None else len(weight)
        dout = y.new_zeros(*y.shape[:-1], features)
    dout_weight = dout_bias = None
    if weight is not None:
        rows = dout.reshape(-1, len(weight))
        dout_weight = rows.t() @ _normed(inputs, y, z).view(-1, weight.shape[1])
        dout_bias = None if inputs.out_bias is None else rows.sum(0)
        dout = (rows @ weight).view(y.shape)
    dzxbcdt = torch.empty_like(inputs.zxbcdt, memory_format=torch.contiguous_format)
    dz, dxBC, ddt = sizes.split(dzxbcdt)
    dy, _, dnorm_weight, *_ = norm.gradients(inputs.norm(y, z), dout, dz=dz)
    del y, dout  # each as large as x: later launches use their memory again
    dconvolved = torch.empty(dxBC.shape, dtype=dxBC.dtype, device=dxBC.device)
    dx, dB, dC = sizes.split_channels(dconvolved)
    if dstates is not None:
        dstates = dstates.contiguous()
    into = SequenceGradients(dx, ddt, dB, dC)
    found = fused_backward.backward(dy.view(dx.shape), dstates, given, into)
    _, _, dA, _, _, dD, _, dinitial, ddt_bias = found
    del given, dy
    convolution, dx_conv = inputs.convolution(xBC), dxBC.transpose(1, 2)
    _, dweight, dbias, dconv_initial = conv.backward(
        convolution, dconvolved.transpose(1, 2), None, dx_conv
    )
    return [
        *(dzxbcdt, None if inputs.conv_initial_states is None else dconv_initial, dinitial, None),
        *(dweight, None if inputs.conv_bias is None else dbias, ddt_bias, dA, dD),
        *(dnorm_weight, dout_weight, dout_bias),
    ]
