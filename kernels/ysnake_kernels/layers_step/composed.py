"""One token through all layers, made of the other operators."""

import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.layers_step.inputs import LayersInputs
from ysnake_kernels.mixer_step import mixer_step
from ysnake_kernels.norm import add_and_norm


def step(inputs: LayersInputs) -> Tensor:
    """`layers_step` of checked arguments, by the implementations that are chosen for h."""
    h, states, layers, norm_weight, eps = inputs
    mixed = None
    for w, own in zip(layers, states, strict=True):
        h, normed = add_and_norm(h, mixed, w.norm_weight, w.eps, w.in_weight.dtype)
        y = mixer_step(F.linear(normed, w.in_weight, w.in_bias), *own, w.mixer)
        mixed = F.linear(y, w.out_weight, w.out_bias)
    return add_and_norm(h, mixed, norm_weight, eps, norm_weight.dtype)[1]
