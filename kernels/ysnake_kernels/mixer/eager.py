"""The mixer in pure torch, as one function: what a CPU trains with.

Saves its arguments. Backward goes over the convolution once more and over the chunks of the scan
once forward, for the states, and once back; what follows the scan, `output`, is taken with it chunk
by chunk, so that neither the scan's output nor its gradient ever exists as a whole. The gradients
of z, of the convolution's input and of dt are written where they belong in the gradient of zxbcdt.
All this is done for a few rows of the batch at a time, so that a chunk stays in the cache.
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.conv import eager as conv
from ysnake_kernels.mixer.composed import scan_inputs
from ysnake_kernels.mixer.output import MergedOutput, output_of
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd import eager as ssd
from ysnake_kernels.ssd.inputs import ScanInputs, SequenceGradients

CHUNK_ELEMENTS = 512 * 1024  # of a chunk of z: two megabytes in float32


def mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    conv_states: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor | None]:
    """Arguments as `composed.mixer`'s without its first, but for activation, which is a bool."""
    # First all is saved, then it is computed: a checkpoint around this, which in backward computes
    # again what was saved, stops at the last that was. This one's work is not done once more.
    parameters = (conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, out_bias)
    tensors = (zxbcdt, conv_states, initial_states, seq_idx, *parameters)
    out, states, rstd = empty_outputs(tensors, options)
    out, states = _Mixer.apply(out, states, rstd, *tensors, *options)
    with torch.no_grad():
        compute(out, states, rstd, tensors, options)
    return out, states


def empty_outputs(
    tensors: tuple[Tensor | None, ...], options: tuple
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Memory for the output, for the states if wanted, and for 1 / rms if backward can use it."""
    zxbcdt, _, initial_states, _, _, _, dt_bias, A, D, norm_weight, out_weight, _ = tensors
    sizes, ngroups, _, _, norm_options, return_states, dtype = options
    d_inner, channels, heads = sizes
    features = d_inner if out_weight is None else out_weight.shape[0]
    new = partial(torch.empty, device=zxbcdt.device)
    out = new(*zxbcdt.shape[:2], features, dtype=zxbcdt.dtype if out_weight is None else dtype)
    states = rstd = None
    if return_states:
        shape = (len(zxbcdt), heads, d_inner // heads, (channels - d_inner) // (2 * ngroups))
        states = new(shape, dtype=accumulator(zxbcdt, A, D, initial_states, dt_bias))
    if MergedOutput.suits(zxbcdt[..., :d_inner], norm_weight, out_weight, norm_options, dtype):
        rstd = new(*zxbcdt.shape[:2], 1, dtype=dtype)
    return out, states, rstd


def compute(
    out: Tensor,
    states: Tensor | None,
    rstd: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    options: tuple,
) -> None:
    """Write what `empty_outputs` made, a few rows of the batch at a time."""
    for rows in _row_groups(tensors[0], options):
        inputs = [None if t is None else t[rows] for t in tensors[:4]]
        scale = None if rstd is None else rstd[rows]
        end = _forward(*inputs, *tensors[4:], *options, scale, out[rows])
        if states is not None:
            states[rows] = end


def gradients(
    dout: Tensor | None,
    dstates: Tensor | None,
    rstd: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    options: tuple,
) -> list[Tensor | None]:
    """Those of the tensors but for seq_idx, a few rows of the batch at a time."""
    zxbcdt, parameters = tensors[0], tensors[4:]
    dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    dstarts = [], []
    totals = [None] * len(parameters)
    for rows in _row_groups(zxbcdt, options):
        inputs = [None if t is None else t[rows] for t in tensors[:4]]
        outer = [None if t is None else t[rows] for t in (rstd, dout, dstates)]
        *starts, grads = _backward(*inputs, *parameters, *options, *outer, dzxbcdt[rows])
        for parts, part in zip(dstarts, starts, strict=True):
            parts.append(part)
        totals = [g if t is None else t.add_(g) for t, g in zip(totals, grads, strict=True)]
    dstarts = [None if parts[0] is None else torch.cat(parts) for parts in dstarts]
    given = [
        None if p is None or g is None else g.to(p.dtype)
        for p, g in zip(parameters, totals, strict=True)
    ]
    return [dzxbcdt, *dstarts, *given]


class _Mixer(torch.autograd.Function):
    """The gradient of what is written to out and states; rstd, written with them, is kept too."""

    @staticmethod
    def forward(ctx, out, states, rstd, *arguments):
        tensors, ctx.options, ctx.rstd = arguments[:12], arguments[12:], rstd
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*(t for t in (out, states) if t is not None))
        return out, states

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstates):
        grads = gradients(dout, dstates, ctx.rstd, ctx.saved_tensors, ctx.options)
        nones = [None] * len(ctx.options)
        return None, None, None, *grads[:3], None, *grads[3:], *nones


def _row_groups(zxbcdt: Tensor, options: tuple) -> list[slice]:
    """The rows of the batch in groups whose chunks stay in the cache."""
    batch, length, _ = zxbcdt.shape
    sizes, scan_options = options[0], options[3]
    chunk_size = min(scan_options[0] or ssd.CPU_CHUNK, length)
    size = max(1, CHUNK_ELEMENTS // (sizes[0] * chunk_size))
    return [slice(start, start + size) for start in range(0, batch, size)]


def _forward(
    zxbcdt,
    conv_states,
    initial_states,
    seq_idx,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    D,
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
    rstd,
    out,
) -> Tensor | None:
    """Writes out and rstd; returns the final states."""
    z, xBC, dt = zxbcdt.split(sizes, dim=-1)
    mixed = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
    edge = None if conv_states is None else conv_states.transpose(1, 2)
    conv.forward(xBC, conv_weight, conv_bias, seq_idx, edge, mixed, activation)
    x, B, C = scan_inputs(mixed, sizes, ngroups)
    weights = (norm_weight, out_weight, out_bias)
    output = output_of(z, weights, norm_options, dtype, rstd)
    output.forward(out)
    tensors = (x, dt, A, B, C, D, None, initial_states, dt_bias, seq_idx, None)
    states, _ = ssd.forward(ScanInputs(*tensors, *scan_options), output.finish, return_states)
    output.project()
    return states


def _backward(
    zxbcdt,
    conv_states,
    initial_states,
    seq_idx,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    D,
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
    rstd,
    dout,
    dstates,
    dzxbcdt,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """Writes dzxbcdt; returns the gradients of conv_states, initial_states and the parameters."""
    z, xBC, dt = zxbcdt.split(sizes, dim=-1)
    dz, dxBC, ddt = dzxbcdt.split(sizes, dim=-1)
    weights = (norm_weight, out_weight, out_bias)
    output = output_of(z, weights, norm_options, dtype, rstd)
    output.backward(dout, dz)
    edge = None if conv_states is None else conv_states.transpose(1, 2)
    acc = accumulator(xBC, conv_weight, conv_bias, edge)
    sums = torch.empty(xBC.shape, dtype=acc, device=xBC.device)
    mixed, dmixed = (torch.empty_like(sums, dtype=xBC.dtype) for _ in "xy")
    conv_arguments = (xBC, conv_weight, conv_bias, seq_idx, edge)
    conv.forward(*conv_arguments, mixed, activation, sums)
    x, B, C = scan_inputs(mixed, sizes, ngroups)
    dx, dB, dC = scan_inputs(dmixed, sizes, ngroups)
    tensors = (x, dt, A, B, C, D, None, initial_states, dt_bias, seq_idx, None)
    scan = ScanInputs(*tensors, *scan_options)
    into = SequenceGradients(dx, ddt, dB, dC)
    dA, dD, dinitial, ddt_bias = ssd.backward(scan, output.gradient, dstates, into)
    dconv_weight, dconv_bias, dedge = conv.backward(*conv_arguments, dmixed, dxBC, activation, sums)
    grads = (dconv_weight, dconv_bias, ddt_bias, dA, dD, *output.parameter_gradients())
    return None if dedge is None else dedge.transpose(1, 2), dinitial, grads
