"""The mixer in pure torch, as one function: what a CPU trains with.

It stores its arguments. Backward computes the convolution again, then goes over the chunks of the
scan once forward, for the states, and once back. What follows the scan (output.py) is computed
chunk by chunk with it, so neither the scan's output nor its gradient ever exists as a whole. The
gradients of z, xBC and dt are written straight into the gradient of zxbcdt. A few rows of the batch
are taken at a time, so that a chunk stays in the cache. Where the caller lets torch round the
factors of products to bfloat16, zxbcdt is stored in bfloat16, which takes half the memory. Its dt
stays exact.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.conv import eager as conv
from ysnake_kernels.custom_op import outside_autocast
from ysnake_kernels.linear import products_are_rounded
from ysnake_kernels.mixer.inputs import BY_ROW, SEQ_IDX, TENSORS, MixerInputs
from ysnake_kernels.mixer.output import MergedOutput, output_of
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd import eager as ssd
from ysnake_kernels.ssd.eager_backward import backward as scan_backward
from ysnake_kernels.ssd.eager_layout import CPU_CHUNK
from ysnake_kernels.ssd.inputs import SequenceGradients

CHUNK_ELEMENTS = 512 * 1024  # of a chunk of z: two megabytes in float32


class Outputs(NamedTuple):
    """What `compute` writes."""

    out: Tensor  # (batch, length, d_inner or d_model)
    states: Tensor | None  # the final states, if wanted
    rstd: Tensor | None  # (batch, length, 1), 1 / rms for backward, if it can use that


def mixer(inputs: MixerInputs) -> tuple[Tensor, Tensor | None]:
    """The output, and the final states if wanted, of checked inputs."""
    # First all is saved for backward, then the output is computed. torch's checkpoint, where a
    # caller uses it, runs this again in backward only until all is saved. So it does not compute
    # the output a second time.
    outputs = empty_outputs(inputs)
    rounded = torch.is_grad_enabled() and products_are_rounded(inputs.zxbcdt)
    out, states = _Mixer.apply(*outputs, rounded, *inputs)
    with torch.no_grad():
        compute(outputs._replace(out=out, states=states), inputs)
    return out, states


def empty_outputs(inputs: MixerInputs) -> Outputs:
    """Memory for the outputs."""
    zxbcdt, sizes, weight = inputs.zxbcdt, inputs.sizes, inputs.out_weight
    new = partial(torch.empty, device=zxbcdt.device)
    batch, length = zxbcdt.shape[:2]
    if weight is None:
        out = new(batch, length, sizes.d_inner, dtype=zxbcdt.dtype)
    else:
        out = new(batch, length, len(weight), dtype=inputs.dtype)
    states = rstd = None
    if inputs.want_states:
        exact = accumulator(zxbcdt, inputs.A, inputs.D, inputs.initial_states, inputs.dt_bias)
        states = new(batch, sizes.heads, sizes.head_dim, sizes.state, dtype=exact)
    if MergedOutput.suits(inputs):
        rstd = new(batch, length, 1, dtype=inputs.dtype)
    return Outputs(out, states, rstd)


def compute(outputs: Outputs, inputs: MixerInputs) -> None:
    """Write the outputs, a few rows of the batch at a time."""
    out, states, rstd = outputs
    for rows in _row_groups(inputs):
        end = _forward(inputs.rows(rows), None if rstd is None else rstd[rows], out[rows])
        if states is not None and end is not None:
            states[rows] = end


def gradients(
    dout: Tensor | None,
    dstates: Tensor | None,
    rstd: Tensor | None,
    inputs: MixerInputs,
    dt: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of all tensors of the inputs but seq_idx, a few rows of the batch at a time.

    Args:
        dout, dstates: the gradients of the outputs; None stands for zeros.
        rstd: what `compute` wrote.
        inputs: those of the mixer. If dt is given, their zxbcdt was rounded after `compute`.
        dt: the exact dt of zxbcdt.
    """
    zxbcdt = inputs.zxbcdt
    dtype = zxbcdt.dtype if dt is None else dt.dtype
    dzxbcdt = torch.empty(zxbcdt.shape, dtype=dtype, device=zxbcdt.device)
    conv_starts: list[Tensor | None] = []
    scan_starts: list[Tensor | None] = []
    totals: list[Tensor | None] = [None] * (TENSORS - BY_ROW)
    for rows in _row_groups(inputs):
        given = BackwardInputs(*(None if t is None else t[rows] for t in (rstd, dout, dstates)))
        part = inputs.rows(rows)
        if dt is not None:
            part = part._replace(zxbcdt=_with_dt(part.zxbcdt, dt[rows]))
        conv_start, scan_start, grads = _backward(part, given, dzxbcdt[rows])
        conv_starts.append(conv_start)
        scan_starts.append(scan_start)
        totals = [
            grad if total is None or grad is None else total.add_(grad)
            for total, grad in zip(totals, grads, strict=True)
        ]
    parameters = [
        None if p is None or g is None else g.to(p.dtype)
        for p, g in zip(inputs[BY_ROW:TENSORS], totals, strict=True)
    ]
    return [dzxbcdt, _joined(conv_starts), _joined(scan_starts), *parameters]


def _with_dt(zxbcdt: Tensor, dt: Tensor) -> Tensor:
    """A copy of zxbcdt in dt's dtype, with this dt at its end."""
    copy = zxbcdt.to(dt.dtype)
    copy[..., -dt.shape[-1] :] = dt
    return copy


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """The parts of the batch in one tensor; None if there are none."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


class _Mixer(torch.autograd.Function):
    """The gradient of what `compute` writes to out and states. It also stores rstd.

    With `rounded` it stores zxbcdt in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        states: Tensor | None,
        rstd: Tensor | None,
        rounded: bool,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.options, ctx.rstd = arguments[TENSORS:], rstd
        inputs, dt = MixerInputs._make(arguments), None
        if rounded:
            dt = inputs.sizes.split(inputs.zxbcdt)[2].contiguous()
            inputs = inputs._replace(zxbcdt=inputs.zxbcdt.bfloat16())
        ctx.save_for_backward(dt, *inputs[:TENSORS])
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*(t for t in (out, states) if t is not None))
        return out, states

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dstates: Tensor | None) -> tuple:
        dt, *tensors = ctx.saved_tensors
        inputs = MixerInputs._make((*tensors, *ctx.options))
        grads = gradients(dout, dstates, ctx.rstd, inputs, dt)
        grads.insert(SEQ_IDX, None)
        return None, None, None, None, *grads, *[None] * len(ctx.options)


def _row_groups(inputs: MixerInputs) -> list[slice]:
    """The rows of the batch in groups whose chunks stay in the cache; at least one group."""
    batch, length, _ = inputs.zxbcdt.shape
    chunk_size = min(inputs.chunk_size or CPU_CHUNK, length)
    size = max(1, CHUNK_ELEMENTS // (inputs.sizes.d_inner * chunk_size))
    return [slice(start, start + size) for start in range(0, max(1, batch), size)]


def _forward(inputs: MixerInputs, rstd: Tensor | None, out: Tensor) -> Tensor | None:
    """Write out and rstd; return the final states, if wanted."""
    z, xBC, dt = inputs.sizes.split(inputs.zxbcdt)
    convolved = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
    conv.forward(inputs.convolution(xBC), convolved)
    output = output_of(inputs, z, rstd)
    output.begin_forward(out)
    states, _ = ssd.forward(inputs.scan(convolved, dt), output.finish, inputs.want_states)
    output.project()
    return states


class BackwardInputs(NamedTuple):
    """The gradients of the outputs, and what forward kept for backward."""

    rstd: Tensor | None
    dout: Tensor | None
    dstates: Tensor | None


def _backward(
    inputs: MixerInputs, given: BackwardInputs, dzxbcdt: Tensor
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """Write dzxbcdt; return the gradients of both initial states and of the parameters."""
    sizes = inputs.sizes
    z, xBC, dt = sizes.split(inputs.zxbcdt)
    dz, dxBC, ddt = sizes.split(dzxbcdt)
    output = output_of(inputs, z, given.rstd)
    output.begin_backward(given.dout, dz)
    convolution = inputs.convolution(xBC)
    acc = accumulator(xBC, inputs.conv_weight, inputs.conv_bias, inputs.conv_initial_states)
    sums = torch.empty(xBC.shape, dtype=acc, device=xBC.device)
    convolved, dconvolved = (torch.empty_like(sums, dtype=xBC.dtype) for _ in range(2))
    conv.forward(convolution, convolved, sums)
    dx, dB, dC = sizes.split_channels(dconvolved)
    into = SequenceGradients(dx, ddt, dB, dC)
    scan = inputs.scan(convolved, dt)
    dA, dD, dinitial, ddt_bias = scan_backward(scan, output.gradient, given.dstates, into)
    dconv_weight, dconv_bias, dconv_initial = conv.backward(convolution, dconvolved, dxBC, sums)
    grads = (dconv_weight, dconv_bias, ddt_bias, dA, dD, *output.parameter_gradients())
    return dconv_initial, dinitial, grads
