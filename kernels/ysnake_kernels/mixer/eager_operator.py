"""The eager mixer as a custom operator, which torch.compile and torch.export leave alone."""

import torch
from torch import Tensor

from ysnake_kernels.custom_op import empty_gradients, with_none, without_none
from ysnake_kernels.mixer import eager

ARGUMENTS = (
    "Tensor zxbcdt, Tensor? conv_states, Tensor? initial_states, Tensor? seq_idx, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, "
    "Tensor? norm_weight, Tensor? out_weight, Tensor? out_bias, "
    "int[] sizes, int ngroups, bool activation, int? chunk_size, bool softplus, float low, "
    "float high, float eps, int group_size, bool norm_before_gate, bool return_states, "
    "ScalarType dtype"
)
TENSORS = 12


def mixer(zxbcdt: Tensor, *arguments) -> tuple[Tensor, Tensor | None]:
    """Arguments as `eager.mixer`'s."""
    if not torch.compiler.is_compiling():
        return eager.mixer(zxbcdt, *arguments)
    conv_weight, conv_bias, dt_bias, A, D, conv_states, initial_states, seq_idx = arguments[:8]
    parameters = (conv_weight, conv_bias, dt_bias, A, D, *arguments[8:11])
    sizes, ngroups, activation, scan_options, norm_options, return_states, dtype = arguments[11:]
    chunk_size, softplus, (low, high) = scan_options
    eps, group_size, norm_before_gate = norm_options
    out, states, _ = _mixer(
        *(zxbcdt, conv_states, initial_states, seq_idx, *parameters),
        *(sizes, ngroups, activation, chunk_size, softplus, float(low), float(high)),
        *(float(eps), group_size, norm_before_gate, return_states, dtype),
    )
    return out, states if return_states else None


def _grouped(arguments: tuple) -> tuple[tuple, tuple]:
    """The tensors, and the options as `eager` has them."""
    sizes, ngroups, activation, chunk_size, softplus, low, high, *norm = arguments[TENSORS:]
    *norm_options, return_states, dtype = norm
    scan_options = (chunk_size, softplus, (low, high))
    options = (sizes, ngroups, activation, scan_options, tuple(norm_options), return_states, dtype)
    return tuple(arguments[:TENSORS]), options


@torch.library.custom_op(
    "ysnake::mixer_eager", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def _mixer(*arguments):
    tensors, options = _grouped(arguments)
    outputs = eager.empty_outputs(tensors, options)
    eager.compute(*outputs, tensors, options)
    return tuple(without_none(outputs))


@_mixer.register_fake
def _(*arguments):
    return tuple(without_none(eager.empty_outputs(*_grouped(arguments))))


@torch.library.custom_op(
    "ysnake::mixer_eager_backward",
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dstates, Tensor rstd, {ARGUMENTS}) -> Tensor[]",
)
def _mixer_backward(dout, dstates, rstd, *arguments):
    tensors, options = _grouped(arguments)
    rstd = rstd if rstd.numel() else None
    return without_none(eager.gradients(dout, dstates, rstd, tensors, options))


@_mixer_backward.register_fake
def _(dout, dstates, rstd, *arguments):
    return empty_gradients(*_differentiable(arguments[:TENSORS]))


def _differentiable(tensors: tuple) -> list[Tensor | None]:
    """Without seq_idx."""
    return [*tensors[:3], *tensors[4:]]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], output[2])
    ctx.options = inputs[TENSORS:]


def _differentiate(ctx, dout, dstates, _):
    *tensors, rstd = ctx.saved_tensors
    grads = _mixer_backward(dout, dstates, rstd, *tensors, *ctx.options)
    grads = with_none(grads, _differentiable(tensors))
    return *grads[:3], None, *grads[3:], *[None] * len(ctx.options)


_mixer.register_autograd(_differentiate, setup_context=_save)
