"""The definition of the causal depthwise convolution, over a sequence and for new tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.conv.inputs import ConvInputs
from ysnake_kernels.numerics import accumulator


def conv(inputs: ConvInputs) -> Tensor:
    """y of `causal_conv1d`, for inputs that it has checked."""
    x, weight, bias, seq_idx, initial_states, silu = inputs
    acc = accumulator(x, weight, bias, initial_states)
    width, length = weight.shape[1], x.shape[2]
    if initial_states is None:
        history = x.new_zeros(*x.shape[:2], width - 1).to(acc)
    else:
        history = initial_states.to(acc)
    padded = torch.cat([history, x.to(acc)], dim=2)
    y = torch.zeros_like(x, dtype=acc)
    for tap in range(width):
        back = width - 1 - tap  # this tap reads the token `back` places before
        term = weight[:, tap].to(acc)[:, None] * padded[:, :, tap : tap + length]
        if seq_idx is not None:
            # tokens before the first one count as its document
            shifted = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], dim=1)[:, :length]
            term = torch.where((seq_idx == shifted)[:, None], term, torch.zeros_like(term))
        y = y + term
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    indices: Tensor | None,
) -> Tensor:
    """y of `causal_conv1d_step`, for checked arguments; `conv_state` is updated in place."""
    rows = slice(None) if indices is None else indices
    before, new = conv_state[rows], x[:, :, None]
    seen = before[:, :, before.shape[2] - weight.shape[1] + 1 :]
    y = conv(ConvInputs(new, weight, bias, None, seen, silu))
    conv_state[rows] = torch.cat([before[:, :, 1:], new.to(conv_state.dtype)], dim=2)
    return y[:, :, 0]
