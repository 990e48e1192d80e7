"""The arguments of the mixer as one value, which every implementation takes.

Its methods give the inputs of the operators that the mixer is made of.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ysnake_kernels.conv.inputs import ConvInputs
from ysnake_kernels.mixer.sizes import MixerSizes
from ysnake_kernels.norm.inputs import NormInputs
from ysnake_kernels.ssd.inputs import ScanInputs

BY_ROW: Final = 4  # the first fields of MixerInputs, which have a row for each sequence
TENSORS: Final = 12  # the first fields of MixerInputs
SEQ_IDX: Final = 3  # the place of the only tensor without a gradient

SCHEMA = (
    "Tensor zxbcdt, Tensor? conv_initial_states, Tensor? initial_states, Tensor? seq_idx, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, "
    "Tensor? norm_weight, Tensor? out_weight, Tensor? out_bias, "
    "int[] sizes, bool silu, int? chunk_size, float[] dt_limit, float eps, "
    "bool norm_before_gate, bool want_states, ScalarType dtype"
)
"""The fields of MixerInputs as a custom operator declares them."""


class MixerInputs(NamedTuple):
    """The arguments of `mamba_split_conv1d_scan_combined`, which documents their meaning.

    A tuple, because custom operators and autograd functions take their arguments one by one: they
    are called with `*inputs` and begin with `mixer_inputs(arguments)`.
    """

    zxbcdt: Tensor
    conv_initial_states: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    norm_weight: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None
    sizes: MixerSizes
    silu: bool  # whether SiLU follows the convolution
    chunk_size: int | None
    dt_limit: tuple[float, float]
    eps: float
    norm_before_gate: bool
    want_states: bool
    dtype: torch.dtype  # of the output projection

    def rows(self, rows: slice) -> "MixerInputs":
        """The inputs of some rows of the batch."""
        by_row = (None if t is None else t[rows] for t in self[:BY_ROW])
        return MixerInputs._make((*by_row, *self[BY_ROW:]))

    def convolution(self, xBC: Tensor) -> ConvInputs:
        """The convolution of xBC (batch, length, channels)."""
        return ConvInputs(
            *(xBC.transpose(1, 2), self.conv_weight, self.conv_bias),
            *(self.seq_idx, self.conv_initial_states, self.silu),
        )

    def scan(self, convolved: Tensor, dt: Tensor, z: Tensor | None = None) -> ScanInputs:
        """The scan of the convolution's output (batch, length, channels).

        dt is (batch, length, heads). A gate z (batch, length, d_inner) is applied by the scan.
        """
        x, B, C = self.sizes.split_channels(convolved)
        gate = None if z is None else z.view(x.shape)
        tensors = (x, dt, self.A, B, C, self.D, gate, self.initial_states, self.dt_bias)
        return ScanInputs(*tensors, self.seq_idx, None, self.chunk_size, True, self.dt_limit)

    def norm(self, y: Tensor, z: Tensor) -> NormInputs:
        """The norm of the scan's output y, with the gate z; both (batch, length, d_inner)."""
        assert self.norm_weight is not None
        group_size = self.sizes.d_inner // self.sizes.groups
        options = (self.eps, group_size, self.norm_before_gate)
        return NormInputs(y, self.norm_weight, None, z, *options)


def mixer_inputs(arguments: Sequence[Any]) -> MixerInputs:
    """The inputs from their fields in order, of which sizes and dt_limit may be lists."""
    inputs = MixerInputs._make(arguments)
    low, high = inputs.dt_limit
    return inputs._replace(sizes=MixerSizes(*inputs.sizes), dt_limit=(low, high))
