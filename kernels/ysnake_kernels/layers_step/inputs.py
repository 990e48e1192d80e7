"""The arguments of one token through all layers as one value, and the weights of a layer."""

from collections.abc import Sequence
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


class LayersInputs(NamedTuple):
    """The arguments of `layers_step`, which documents them."""

    h: Tensor  # may be overwritten
    states: Sequence[tuple[Tensor, Tensor]]  # updated in place
    layers: Sequence[LayerWeights]
    norm_weight: Tensor
    eps: float
