"""Packed sequences in one row, scanned one after another."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def scan_each(
    scan: Callable, cu_seqlens: Tensor, x, dt, A, B, C, chunk_size, D, z, initial_states, *options
) -> tuple[Tensor, Tensor]:
    """`scan` of every sequence: all outputs in a row, and a state for each sequence.

    An empty sequence ends in the state that it starts from.
    """
    outputs, ends = [], []
    for k, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = None if initial_states is None else initial_states[k : k + 1]
        if start < end:
            piece = [None if t is None else t[:, start:end] for t in (x, dt, B, C, z)]
            arguments = (*piece[:2], A, *piece[2:4], chunk_size, D, piece[4], state)
            y, state = scan(*arguments, *options)
            outputs.append(y)
            last = state
        ends.append(state)
    states = [torch.zeros_like(last) if end is None else end.to(last.dtype) for end in ends]
    return torch.cat(outputs, 1), torch.cat(states)
