"""Packed sequences in one row, scanned one after another."""

from collections.abc import Callable

import torch
from torch import Tensor

from ysnake_kernels.ssd.inputs import ScanInputs


def scan_each(
    scan: Callable[[ScanInputs], tuple[Tensor, Tensor]], inputs: ScanInputs
) -> tuple[Tensor, Tensor]:
    """Scan each packed sequence alone. Return all outputs in a row, and the states of each.

    An empty sequence ends in the state from which it starts.
    """
    outputs, states = [], []
    for number, (start, end) in enumerate(inputs.spans()):
        sequence = inputs.packed_sequence(number, start, end)
        if start < end:
            y, state = scan(sequence)
            outputs.append(y)
        elif sequence.initial_states is None:
            state = sequence.empty_states().zero_()
        else:
            state = sequence.initial_states.to(inputs.accumulator)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)
