"""Memory that an operator hands to its caller."""

import torch
from torch import Tensor


def empty_like(x: Tensor) -> Tensor:
    """An empty tensor of the shape of x (batch, channels, length), channel-last if x is.

    It is no view: autograd refuses to change a view in place that an autograd function returned.
    """
    channels, length = x.shape[1:]
    last = x.stride(1) == 1
    strides = (length * channels, 1, channels) if last else (channels * length, length, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def as_base(view: Tensor) -> Tensor:
    """A tensor on the same memory that autograd does not know as a view.

    For an output whose memory was taken with another shape; nobody else may use that memory.
    """
    place = view.storage_offset(), view.shape, view.stride()
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(view.untyped_storage(), *place)
