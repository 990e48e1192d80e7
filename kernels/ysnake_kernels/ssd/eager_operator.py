"""The eager scan as PyTorch sees it: an autograd function, and a custom operator for torch.compile.

The function keeps for backward the states between chunks and what is read of them. The operator
keeps its inputs only, since an operator's outputs cannot depend on sizes that easily.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.custom_op import empty_gradients, with_none, without_none
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd.eager import backward, forward, gate_backward
from ysnake_kernels.ssd.sequences import scan_each

ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? initial_states, Tensor? dt_bias, Tensor? seq_idx, Tensor? cu_seqlens, "
    "int? chunk_size, bool softplus, float low, float high"
)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `ssd_scan` has checked them."""
    tensors = (x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx)
    options = (chunk_size, bool(dt_softplus), *map(float, dt_limit))
    if torch.compiler.is_compiling():
        return _scan(*tensors, cu_seqlens, *options)
    if cu_seqlens is not None:
        packed = (x, dt, A, B, C, chunk_size, D, z, initial_states)
        return scan_each(scan, cu_seqlens, *packed, None, dt_bias, dt_softplus, dt_limit)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Scan.apply(*tensors, _grouped(options), keep)


def _grouped(options: tuple) -> tuple[int | None, bool, tuple[float, float]]:
    chunk_size, softplus, low, high = options
    return chunk_size, softplus, (low, high)


def _run(
    x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, options, keep=False
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """y, the final states, and what `_gradients` likes to have kept."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def finish(span: slice, y: Tensor) -> None:
        if z is not None:
            out[:, span] = y * F.silu(z[:, span].to(y.dtype))

    arguments = (x, dt, A, B, C, D, initial_states, dt_bias, seq_idx, options)
    final, kept = forward(*arguments, finish, out=out if z is None else None, keep=keep)
    return out, final.clone(), kept  # else it would hold on to the states of other chunks


def _gradients(
    dout, dstates, x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, options, kept=(None,)
) -> tuple[Tensor | None, ...]:
    """Those of the tensors before seq_idx."""
    if dout is None:
        dout = torch.zeros_like(x)
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
    dz = None if z is None else torch.empty_like(z)

    def gradient(span: slice, y: Callable[[], Tensor]) -> Tensor:
        if z is None:
            return dout[:, span]
        G, dz[:, span], _ = gate_backward(y(), z[:, span], dout[:, span])
        return G

    arguments = (x, dt, A, B, C, D, initial_states, dt_bias, seq_idx, options)
    grads = backward(*arguments, gradient, dstates, dx, ddt, dB, dC, kept)
    dA, dD, dinitial, dbias = grads
    return dx, ddt, dA, dB, dC, dD, dz, dinitial, dbias


class _Scan(torch.autograd.Function):
    """Saves its inputs, the states between chunks and what is read of them; recomputes the rest."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, options, keep = arguments
        ctx.options = options
        ctx.set_materialize_grads(False)
        out, final, kept = _run(*tensors, options, keep)
        ctx.save_for_backward(*tensors, *kept)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstates):
        tensors, kept = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        return *_gradients(dout, dstates, *tensors, ctx.options, kept), None, None, None


@torch.library.custom_op(
    "ysnake::ssd_scan_eager", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)"
)
def _scan(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens, *options):
    chunk_size, softplus, limit = _grouped(options)

    def run(x, dt, A, B, C, chunk_size, D, z, state, seq_idx, *_):
        tensors = (x, dt, A, B, C, D, z, state, dt_bias, seq_idx)
        return _run(*tensors, (chunk_size, softplus, limit))[:2]

    arguments = (x, dt, A, B, C, chunk_size, D, z, initial_states, seq_idx)
    return run(*arguments) if cu_seqlens is None else scan_each(run, cu_seqlens, *arguments)


@_scan.register_fake
def _(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens, *options):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    exact = accumulator(x, dt, A, B, C, D, initial_states, dt_bias)
    states = x.new_empty(sequences, *x.shape[2:], B.shape[3], dtype=exact)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), states


@torch.library.custom_op(
    "ysnake::ssd_scan_eager_backward",
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dstates, {ARGUMENTS}) -> Tensor[]",
)
def _scan_backward(dout, dstates, *arguments):
    *tensors, cu_seqlens = arguments[:11]
    options = _grouped(arguments[11:])
    if cu_seqlens is None:
        return without_none(_gradients(dout, dstates, *tensors, options))
    x, dt, A, B, C, D, z, initial_states, dt_bias, _ = tensors
    total = [None if t is None else torch.zeros_like(t) for t in tensors[:9]]
    dx, ddt, dA, dB, dC, dD, dz, dinitial, dbias = total
    for k, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state, dstate = (None if t is None else t[k : k + 1] for t in (initial_states, dstates))
        if start == end:
            if dinitial is not None and dstate is not None:
                dinitial[k] = dstate[0]
            continue
        cut = [None if t is None else t[:, start:end] for t in (dout, x, dt, B, C, z)]
        piece = (cut[1], cut[2], A, cut[3], cut[4], D, cut[5], state, dt_bias, None)
        grads = _gradients(cut[0], dstate, *piece, options)
        placed = [None if t is None else t[:, start:end] for t in (dx, ddt, dB, dC, dz)]
        for to, grad in zip(placed, (*grads[:2], *grads[3:5], grads[6]), strict=True):
            if to is not None:
                to.copy_(grad)
        for to, grad in ((dA, grads[2]), (dD, grads[5]), (dbias, grads[8])):
            if to is not None:
                to += grad
        if dinitial is not None:
            dinitial[k] = grads[7][0]
    return without_none(total)


@_scan_backward.register_fake
def _(dout, dstates, x, dt, A, B, C, D, z, initial_states, dt_bias, *_):
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
    dz = x.new_empty(0) if z is None else torch.empty_like(z)
    dA, dD, dinitial, dbias = empty_gradients(A, D, initial_states, dt_bias)
    return [dx, ddt, dA, dB, dC, dD, dz, dinitial, dbias]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]


def _differentiate(ctx, dout, dstates):
    grads = _scan_backward(dout, dstates, *ctx.saved_tensors, *ctx.options)
    nones = [None] * (2 + len(ctx.options))
    return *with_none(grads, ctx.saved_tensors[:9]), *nones


_scan.register_autograd(_differentiate, setup_context=_save)
