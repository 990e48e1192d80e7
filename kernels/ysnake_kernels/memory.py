"""Memory for the outputs of operators, which a caller may change in place."""

import torch
from torch import Tensor


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape of x (batch, channels, length), channel-last if x is.

    It is not a view. Autograd refuses in-place changes of a view that an autograd function
    returned.
    """
    channels, length = x.shape[1:]
    last = x.stride(1) == 1
    strides = (length * channels, 1, channels) if last else (channels * length, length, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def as_base(view: Tensor) -> Tensor:
    """A tensor on the same memory that autograd does not treat as a view.

    For an output whose memory was allocated in another shape. Nothing else may use that memory.
    """
    place = view.storage_offset(), view.shape, view.stride()
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(view.untyped_storage(), *place)
