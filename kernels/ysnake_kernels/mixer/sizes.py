"""The sizes of a mixer, and the two splits that follow from them."""

from typing import NamedTuple

from torch import Tensor


class MixerSizes(NamedTuple):
    """The sizes of a mixer.

    The input projection gives each token the gate z (d_inner numbers), the input xBC of the
    convolution (channels) and the step size dt (heads). The convolution turns xBC into x
    (heads x head_dim = d_inner), B and C (groups x state each).
    """

    d_inner: int
    heads: int
    groups: int
    state: int

    @property
    def channels(self) -> int:
        """The channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.groups * self.state

    @property
    def head_dim(self) -> int:
        """The numbers of x that a head has for each token."""
        return self.d_inner // self.heads

    @property
    def projection(self) -> list[int]:
        """The sizes of z, xBC and dt."""
        return [self.d_inner, self.channels, self.heads]

    @property
    def convolved(self) -> list[int]:
        """The sizes of x, B and C."""
        return [self.d_inner, self.groups * self.state, self.groups * self.state]

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xBC and dt: views of the last dimension of what the input projection gives."""
        z, xBC, dt = projected.split_with_sizes(self.projection, -1)
        return z, xBC, dt

    def split_channels(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., heads, head_dim), B and C (..., groups, state): views of (..., channels)."""
        x, B, C = xBC.split_with_sizes(self.convolved, -1)
        before = xBC.shape[:-1]
        shape = (*before, self.groups, self.state)
        return x.view(*before, self.heads, self.head_dim), B.view(shape), C.view(shape)
