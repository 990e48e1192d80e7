"""The eager mixer as a custom operator, which torch.compile and torch.export leave alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ysnake_kernels.custom_op import empty_gradients, with_none, without_none
from ysnake_kernels.mixer import eager
from ysnake_kernels.mixer.inputs import SCHEMA, SEQ_IDX, TENSORS, MixerInputs, mixer_inputs


def mixer(inputs: MixerInputs) -> tuple[Tensor, Tensor | None]:
    """The output, and the final states if wanted, of checked inputs."""
    if not torch.compiler.is_compiling():
        return eager.mixer(inputs)
    tensors = inputs[:TENSORS]
    options: list[Any] = list(inputs[TENSORS:])
    options[0] = list(inputs.sizes)  # an operator takes lists, no tuples of our own
    out, states, _ = _mixer(*tensors, *options)
    return out, states if inputs.want_states else None


@torch.library.custom_op(
    "ysnake::mixer_eager", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
def _mixer(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = mixer_inputs(arguments)
    outputs = eager.empty_outputs(inputs)
    eager.compute(outputs, inputs)
    return tuple(without_none(outputs))


@_mixer.register_fake
def _(*arguments):
    return tuple(without_none(eager.empty_outputs(mixer_inputs(arguments))))


@torch.library.custom_op(
    "ysnake::mixer_eager_backward",
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dstates, Tensor rstd, {SCHEMA}) -> Tensor[]",
)
def _mixer_backward(
    dout: Tensor | None, dstates: Tensor | None, rstd: Tensor, *arguments: Any
) -> list[Tensor]:
    given = rstd if rstd.numel() else None
    return without_none(eager.gradients(dout, dstates, given, mixer_inputs(arguments)))


@_mixer_backward.register_fake
def _(dout, dstates, rstd, *arguments):
    return empty_gradients(*_with_gradient(arguments[:TENSORS]))


def _with_gradient(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors of MixerInputs that have a gradient."""
    return [t for place, t in enumerate(tensors) if place != SEQ_IDX]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], output[2])
    ctx.options = inputs[TENSORS:]


def _differentiate(
    ctx: Any, dout: Tensor | None, dstates: Tensor | None, drstd: Tensor | None
) -> tuple:
    *tensors, rstd = ctx.saved_tensors
    grads = _mixer_backward(dout, dstates, rstd, *tensors, *ctx.options)
    grads = with_none(grads, _with_gradient(tensors))
    grads.insert(SEQ_IDX, None)
    return *grads, *[None] * len(ctx.options)


_mixer.register_autograd(_differentiate, setup_context=_save)
