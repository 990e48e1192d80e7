"""Padding: rows of a batch whose index is -1, and tokens at the end whose document number is -1."""

from collections.abc import Callable

import torch
from torch import Tensor


def skip_padding(call: Callable[..., Tensor], indices: Tensor | None, *rows: Tensor | None):
    """Call a function for the rows in use. The rows whose index is -1 get zeros.

    This looks at the values, so it waits for a GPU. Compiled functions do not look: under
    torch.compile all rows must be in use.

    Args:
        call: takes `indices` and `rows` of a smaller batch, and returns a result for each row.
        indices: (batch,); None means that all rows are in use.
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
    """seq_idx in which the padding at the end is a document of its own, and a mask of the padding.

    Both are (batch, length). Padding has the number -1 in the argument.
    """
    padding = seq_idx < 0
    return seq_idx.masked_fill(padding, torch.iinfo(seq_idx.dtype).max), padding
