"""The mixer made of the other operators, by the implementation that was chosen for them.

Intermediate tensors are not stored: torch's checkpoint computes them again in backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ysnake_kernels import conv, norm, ssd
from ysnake_kernels.mixer.inputs import TENSORS, MixerInputs


def mixer(name: str, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
    """The output and the final states of checked inputs, by the implementation `name`."""
    if name == "fused" and inputs.norm_weight is not None and not torch.compiler.is_compiling():
        from ysnake_kernels.mixer import fused  # here, since it needs triton

        return fused.mixer(inputs)
    options = inputs[TENSORS:]

    def compute(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _compute(name, MixerInputs._make((*tensors, *options)))

    return checkpoint(compute, *inputs[:TENSORS], use_reentrant=False, preserve_rng_state=False)


def _compute(name: str, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
    z, xBC, dt = inputs.sizes.split(inputs.zxbcdt)
    convolved, _ = conv.run(name, inputs.convolution(xBC))
    gate = z if inputs.norm_weight is None else None
    y, states = ssd.run(name, inputs.scan(convolved.transpose(1, 2), dt, gate))
    y = y.flatten(2)
    if inputs.norm_weight is not None:
        y = norm.run(name, inputs.norm(y, z), y.dtype)
    if inputs.out_weight is not None:
        bias = None if inputs.out_bias is None else inputs.out_bias.to(inputs.dtype)
        y = F.linear(y.to(inputs.dtype), inputs.out_weight.to(inputs.dtype), bias)
    return y, states
