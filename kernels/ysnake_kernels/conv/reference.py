"""The definition of the causal depthwise convolution, over a sequence and for new tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.numerics import accumulator


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Arguments as `causal_conv1d` has checked them."""
    acc = accumulator(x, weight, bias, initial_states)
    width, length = weight.shape[1], x.shape[2]
    if initial_states is None:
        history = x.new_zeros(*x.shape[:2], width - 1).to(acc)
    else:
        history = initial_states.to(acc)
    padded = torch.cat([history, x.to(acc)], dim=2)
    y = torch.zeros_like(x, dtype=acc)
    for tap in range(width):
        back = width - 1 - tap  # this tap looks at the token `back` places before
        term = weight[:, tap].to(acc)[:, None] * padded[:, :, tap : tap + length]
        if seq_idx is not None:
            # before the first token stands the first token's document
            shifted = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], dim=1)[:, :length]
            term = torch.where((seq_idx == shifted)[:, None], term, torch.zeros_like(term))
        y = y + term
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype)


def conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Arguments as `causal_conv1d_step` has checked them; `conv_state` is updated in place."""
    rows = slice(None) if conv_state_indices is None else conv_state_indices
    before, new = conv_state[rows], x[:, :, None]
    seen = before[:, :, before.shape[2] - weight.shape[1] + 1 :]
    y = conv(new, weight, bias, None, seen, activation)
    conv_state[rows] = torch.cat([before[:, :, 1:], new.to(conv_state.dtype)], dim=2)
    return y[:, :, 0]
