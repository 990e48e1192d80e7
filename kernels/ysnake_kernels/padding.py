"""Padding: servers fill a batch up with rows whose index is -1, which no sequence belongs to."""

from collections.abc import Callable

import torch
from torch import Tensor


def skip_padding(call: Callable[..., Tensor], indices: Tensor | None, *rows: Tensor | None):
    """call(indices, *rows) for the rows in use; zeros for the rows whose index is -1.

    Looks at the values, for which a GPU has to be waited for. torch.compile cannot do that: what it
    compiled takes rows in use only.

    Args:
        call: takes indices and rows of a smaller batch, and returns a result for each row.
        indices: (batch,), or None.
        rows: tensors (batch, ...), or None.
    """
    compiling = torch.compiler.is_compiling()
    if indices is None or compiling or not bool((indices < 0).any()):
        return call(indices, *rows)
    used = (indices >= 0).nonzero()[:, 0]
    some = call(indices[used], *(None if t is None else t[used] for t in rows))
    result = some.new_zeros(len(indices), *some.shape[1:])
    result[used] = some
    return result


def documents_before_padding(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """seq_idx with the padding at the end (-1) as a document of its own, and a mask of the padding,
    both (batch, length)."""
    padding = seq_idx < 0
    return seq_idx.masked_fill(padding, torch.iinfo(seq_idx.dtype).max), padding
