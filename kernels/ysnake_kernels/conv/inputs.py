"""The arguments of the convolution as one value, which every implementation takes."""

from typing import NamedTuple

from torch import Tensor


class ConvInputs(NamedTuple):
    """The arguments of `causal_conv1d`, which documents their shapes, dtypes and meaning.

    A tuple, because custom operators and autograd functions take their arguments one by one.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    seq_idx: Tensor | None
    initial_states: Tensor | None
    silu: bool  # whether SiLU follows

    @property
    def width(self) -> int:
        """The number of tokens that each output depends on."""
        return self.weight.shape[1]
