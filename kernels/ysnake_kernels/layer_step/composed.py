"""One token through a whole layer, made of the other operators."""

import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.layer_step.weights import LayerWeights
from ysnake_kernels.mixer_step import mixer_step
from ysnake_kernels.norm import add_and_norm


def step(h: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: LayerWeights) -> None:
    """`layer_step` of checked arguments, by the implementations that are chosen for h."""
    w = weights
    _, normed = add_and_norm(h, None, w.norm_weight, w.eps, w.in_weight.dtype)
    projected = F.linear(normed, w.in_weight, w.in_bias)
    y = mixer_step(projected, conv_state, ssm_state, w.mixer)
    h += F.linear(y, w.out_weight, w.out_bias)
