"""The weights of a mixer between its projections, as the one-token form takes them."""

from typing import NamedTuple

from torch import Tensor

from ysnake_kernels.mixer.sizes import MixerSizes


class MixerWeights(NamedTuple):
    """The weights of a mixer and their sizes; `mixer_step` documents them."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor
    sizes: MixerSizes
    dt_limit: tuple[float, float]
    eps: float
