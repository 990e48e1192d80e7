"""The arguments of a scan as one value, which every implementation takes."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ysnake_kernels.numerics import accumulator

TENSORS: Final = 11  # the first fields of ScanInputs
DIFFERENTIABLE: Final = 9  # the first fields of ScanInputs, those with a gradient

SCHEMA = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? initial_states, Tensor? dt_bias, Tensor? seq_idx, Tensor? cu_seqlens, "
    "int? chunk_size, bool dt_softplus, float[] dt_limit"
)
"""The fields of ScanInputs as a custom operator declares them."""


class ScanInputs(NamedTuple):
    """The arguments of `ssd_scan`, which documents their shapes, dtypes and meaning.

    It is a tuple because custom operators and autograd functions take their arguments one by one.
    They are called with `*inputs`, and rebuild the value with `ScanInputs(*arguments)`.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    initial_states: Tensor | None = None
    dt_bias: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    chunk_size: int | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums, exponents and states."""
        return accumulator(*self[:DIFFERENTIABLE])

    @property
    def sequences(self) -> int:
        """The number of sequences: of packed ones, or of rows of the batch."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def empty_states(self) -> Tensor:
        """Uninitialised memory for the final states (sequences, heads, P, N)."""
        shape = (self.sequences, *self.x.shape[2:], self.B.shape[3])
        return torch.empty(shape, dtype=self.accumulator, device=self.x.device)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first token of each packed sequence, and the token after its last."""
        assert self.cu_seqlens is not None
        return pairwise(self.cu_seqlens.tolist())

    def packed_sequence(self, number: int, start: int, end: int) -> "ScanInputs":
        """The arguments of one packed sequence alone, which has the tokens from start to end."""
        state = self.initial_states
        return self._replace(
            x=self.x[:, start:end],
            dt=self.dt[:, start:end],
            B=self.B[:, start:end],
            C=self.C[:, start:end],
            z=None if self.z is None else self.z[:, start:end],
            initial_states=None if state is None else state[number : number + 1],
            cu_seqlens=None,
        )


class ScanGradients(NamedTuple):
    """The gradients of the differentiable fields of ScanInputs; None for what is absent."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    initial_states: Tensor | None
    dt_bias: Tensor | None


class SequenceGradients(NamedTuple):
    """Memory for the gradients of x, dt, B and C, which a backward pass writes.

    Each has the shape of its argument. The numbers of a token lie side by side. The tensors may be
    slices of a larger one.
    """

    dx: Tensor
    ddt: Tensor
    dB: Tensor
    dC: Tensor
