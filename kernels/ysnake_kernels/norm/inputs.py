"""The arguments of the gated norm as one value, which every implementation takes."""

from typing import NamedTuple

from torch import Tensor


class NormInputs(NamedTuple):
    """The arguments of `rms_norm_gated`, which documents their shapes, dtypes and meaning.

    A tuple, because custom operators and autograd functions take their arguments one by one.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor | None
    eps: float
    group_size: int
    norm_before_gate: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, weight, bias and z."""
        return self[:4]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> NormInputs:
    """The inputs of a norm over all features, without bias and gate."""
    return NormInputs(x, weight, None, None, eps, x.shape[-1], True)
