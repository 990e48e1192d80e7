"""The arguments of a recurrent step as one value, which every implementation takes."""

from typing import NamedTuple

from torch import Tensor


class StepInputs(NamedTuple):
    """The arguments of `ssd_step`, which documents their shapes, dtypes and meaning."""

    state: Tensor  # updated in place
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    indices: Tensor | None  # state_batch_indices
    dt_softplus: bool
    dt_limit: tuple[float, float]
