"""Padding: rows of a batch whose index is -1, and tokens at the end whose document number is -1."""

from collections.abc import Callable

import torch
from torch import Tensor


def skip_padding(
    call: Callable[..., Tensor], state: Tensor, indices: Tensor | None, *rows: Tensor | None
):
    """Call a function for the rows in use. The rows whose index is -1 get zeros.

    This looks at the values, so it waits for a GPU. Under torch.compile nothing can look.

    Args:
        call: takes `indices` and `rows` of a smaller batch, and returns a result for each row. It
            updates the rows `indices` of `state` in place.
        state: (rows, ...).
        indices: (batch,); None means that all rows are in use.
        rows: tensors (batch, ...), or None.
    """
    if indices is None or len(indices) == 0:
        return call(indices, *rows)
    if torch.compiler.is_compiling():
        return _repeat_in_place_of_padding(call, state, indices, *rows)
    if not bool((indices < 0).any()):
        return call(indices, *rows)
    used = (indices >= 0).nonzero()[:, 0]
    some = call(indices[used], *(None if t is None else t[used] for t in rows))
    result = some.new_zeros(len(indices), *some.shape[1:])
    result[used] = some
    return result


def _repeat_in_place_of_padding(
    call: Callable[..., Tensor], state: Tensor, indices: Tensor, *rows: Tensor | None
) -> Tensor:
    """`skip_padding` without a look at the values: padding repeats the work of a row in use.

    Both write the same to the state. If no row is in use, the last row of the state is written, and
    then gets its old values back.
    """
    used, last = indices >= 0, state[-1].clone()
    places = torch.arange(len(indices), device=indices.device)
    places = torch.where(used, places, used.int().argmax())
    result = call(indices[places], *(None if t is None else t[places] for t in rows))
    state[-1] = torch.where(used.any(), state[-1], last)
    return result.masked_fill(~used.view(-1, *[1] * (result.ndim - 1)), 0)


def documents_before_padding(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """seq_idx in which the padding at the end is a document of its own, and a mask of the padding.

    Both are (batch, length). Padding has the number -1 in the argument.
    """
    padding = seq_idx < 0
    return seq_idx.masked_fill(padding, torch.iinfo(seq_idx.dtype).max), padding
