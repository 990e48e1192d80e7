"""The weights of a whole layer, as its one-token form takes them."""

from typing import NamedTuple

from torch import Tensor

from ysnake_kernels.mixer_step.weights import MixerWeights


class LayerWeights(NamedTuple):
    """The weights of a layer; `layers_step` documents them."""

    norm_weight: Tensor
    eps: float  # of the norm before the mixer; the mixer's norm has its own
    in_weight: Tensor
    in_bias: Tensor | None
    mixer: MixerWeights
    out_weight: Tensor
    out_bias: Tensor | None
