"""The eager scan as PyTorch sees it: an autograd function, and a custom operator for torch.compile.

The autograd function saves for backward its inputs and, where they are small enough, the states
between chunks and what the chunks read of them. The operator saves only its inputs, since the
number of an operator's outputs is fixed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.custom_op import (
    empty_gradients,
    outside_autocast,
    with_none,
    without_none,
)
from ysnake_kernels.ssd.eager import forward
from ysnake_kernels.ssd.eager_backward import backward, gate_backward
from ysnake_kernels.ssd.inputs import (
    DIFFERENTIABLE,
    SCHEMA,
    TENSORS,
    ScanGradients,
    ScanInputs,
    SequenceGradients,
)
from ysnake_kernels.ssd.sequences import scan_each

OPTIONS = len(ScanInputs._fields) - TENSORS
ONE_FOR_EACH_TOKEN = ("x", "dt", "B", "C", "z")


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y and the final states, of inputs that `ssd_scan` has checked."""
    if torch.compiler.is_compiling():
        return _scan(*inputs)
    if inputs.cu_seqlens is not None:
        return scan_each(scan, inputs)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in inputs[:DIFFERENTIABLE]
    )
    return _Scan.apply(keep, *inputs)


def _run(inputs: ScanInputs, keep: bool = False) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """y, the final states, and what `_gradients` can use again if `keep`."""
    x, z = inputs.x, inputs.z
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def finish(tokens: slice, y: Tensor) -> None:
        if z is not None:
            out[:, tokens] = y * F.silu(z[:, tokens].to(y.dtype))

    final, kept = forward(inputs, finish, out=out if z is None else None, keep=keep)
    assert final is not None
    return out, final.clone(), kept  # a clone, since `final` may be a view of the kept states


def _gradients(
    dout: Tensor | None,
    dstates: Tensor | None,
    inputs: ScanInputs,
    kept: Sequence[Tensor | None] = (),
) -> ScanGradients:
    """The gradients of the inputs, from those of y and of the final states; None means zeros."""
    x, z = inputs.x, inputs.z
    dy = torch.zeros_like(x) if dout is None else dout
    dz = None if z is None else torch.empty_like(z)

    def gradient(tokens: slice, y: Callable[[], Tensor]) -> Tensor:
        if z is None or dz is None:
            return dy[:, tokens]
        G, dz[:, tokens], _ = gate_backward(y(), z[:, tokens], dy[:, tokens])
        return G

    into = SequenceGradients(*(torch.empty_like(t) for t in (x, inputs.dt, inputs.B, inputs.C)))
    dA, dD, dinitial, dbias = backward(inputs, gradient, dstates, into, kept)
    return ScanGradients(into.dx, into.ddt, dA, into.dB, into.dC, dD, dz, dinitial, dbias)


class _Scan(torch.autograd.Function):
    """Saves its inputs and what `forward` keeps for `backward`, and computes the rest again."""

    @staticmethod
    def forward(ctx, keep, *arguments):
        out, final, kept = _run(ScanInputs(*arguments), keep)
        ctx.options = arguments[TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:TENSORS], *kept)
        return out, final

    @staticmethod
    @outside_autocast
    @once_differentiable
    def backward(ctx, dout, dstates):
        saved = ctx.saved_tensors  # read once: torch's checkpoint allows no second time
        tensors, kept = saved[:TENSORS], saved[TENSORS:]
        grads = _gradients(dout, dstates, ScanInputs(*tensors, *ctx.options), kept)
        return None, *grads, None, None, *[None] * OPTIONS


@torch.library.custom_op(
    "ysnake::ssd_scan_eager", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
def _scan(*arguments):
    inputs = ScanInputs(*arguments)
    return _run_one(inputs) if inputs.cu_seqlens is None else scan_each(_run_one, inputs)


def _run_one(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    out, final, _ = _run(inputs)
    return out, final


@_scan.register_fake
def _(*arguments):
    inputs = ScanInputs(*arguments)
    y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    return y, inputs.empty_states()


@torch.library.custom_op(
    "ysnake::ssd_scan_eager_backward",
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dstates, {SCHEMA}) -> Tensor[]",
)
def _scan_backward(dout, dstates, *arguments):
    inputs = ScanInputs(*arguments)
    if inputs.cu_seqlens is None:
        return without_none(_gradients(dout, dstates, inputs))
    totals = [t.zero_() for t in _empty_gradients(inputs)]
    for number, (start, end) in enumerate(inputs.spans()):
        dstate = None if dstates is None else dstates[number : number + 1]
        if start == end:
            if inputs.initial_states is not None and dstate is not None:
                totals[ScanGradients._fields.index("initial_states")][number] = dstate[0]
            continue
        dy = None if dout is None else dout[:, start:end]
        grads = _gradients(dy, dstate, inputs.packed_sequence(number, start, end))
        for name, total, grad in zip(ScanGradients._fields, totals, grads, strict=True):
            if grad is None:
                continue
            if name in ONE_FOR_EACH_TOKEN:
                total[:, start:end] = grad
            elif name == "initial_states":
                total[number] = grad[0]
            else:
                total += grad
    return totals


@_scan_backward.register_fake
def _(dout, dstates, *arguments):
    return _empty_gradients(ScanInputs(*arguments))


def _empty_gradients(inputs: ScanInputs) -> list[Tensor]:
    """Memory for the gradients, in the order of ScanGradients; no elements for what is absent."""
    x, dt, A, B, C, D, z, initial_states, dt_bias = inputs[:DIFFERENTIABLE]
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
    dz = x.new_empty(0) if z is None else torch.empty_like(z)
    dA, dD, dinitial, dbias = empty_gradients(A, D, initial_states, dt_bias)
    return [dx, ddt, dA, dB, dC, dD, dz, dinitial, dbias]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _differentiate(ctx, dout, dstates):
    saved = ctx.saved_tensors
    grads = _scan_backward(dout, dstates, *saved, *ctx.options)
    return *with_none(grads, saved[:DIFFERENTIABLE]), None, None, *[None] * OPTIONS


_scan.register_autograd(_differentiate, setup_context=_save)
