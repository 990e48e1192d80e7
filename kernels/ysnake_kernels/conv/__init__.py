"""Causal depthwise convolution: arguments, checks, and the choice of implementation."""

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import INTEGERS, check, check_indices, check_rank, check_seq_idx
from ysnake_kernels.conv import eager, reference
from ysnake_kernels.padding import skip_padding


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel's weighted sum over its last `width` tokens, then SiLU if asked for.

        y[c, t] = act(bias[c] + sum_k weight[c, k] x[c, t - width + 1 + k])

    Names and layouts are those of causal_conv1d's `causal_conv1d_fn`. Summed in float32 (float64 if
    an input is). Differentiable once in every floating-point argument.

    Args:
        x: (batch, channels, length), any strides; channel-last memory is the fast case.
        weight: (channels, width), width at least 2.
        bias: (channels,).
        seq_idx: (batch, length) int32 or int64, the document of each token, never decreasing; no
            token sees another document's.
        initial_states: (batch, channels, width - 1), the tokens before the first one, oldest first;
            with `seq_idx` they belong to the first token's document. None means zeros.
        return_final_states: also return the last width - 1 tokens, to hand on as `initial_states`.
        activation: None, "silu" or "swish".

    Returns:
        y with the shape and dtype of x, or (y, final_states) with final_states
        (batch, channels, width - 1); with `seq_idx`, tokens of an earlier document are zeros in it.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: the convolution of the Mamba-2 block, arXiv 2405.21060, section 7.
    """
    width = check_conv(x, weight, bias, seq_idx, initial_states, activation)
    name = choose(x)
    tensors = (x, weight, bias, seq_idx, initial_states)
    with torch.autocast(x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.conv import fused  # here, since it needs triton

            y, final_states = fused.conv(*tensors, activation)
            return (y, final_states) if return_final_states else y
        y = (reference if name == "reference" else eager).conv(*tensors, activation)
        if not return_final_states:
            return y
        return y, last_tokens(x, initial_states, seq_idx, width)


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
) -> int:
    """The width of the convolution, after the checks of `causal_conv1d`'s arguments."""
    check_rank("x", x, "batch, channels, length")
    batch, channels, length = x.shape
    if length < 1:
        raise ValueError("x: expected a length of at least 1, got 0")
    width = _check_weight(x, weight, bias, activation)
    if seq_idx is not None:
        check("seq_idx", seq_idx, (batch, length), x, dtypes=INTEGERS)
        check_seq_idx(seq_idx)
    if initial_states is not None:
        check("initial_states", initial_states, (batch, channels, width - 1), x)
    return width


def last_tokens(
    x: Tensor, initial_states: Tensor | None, seq_idx: Tensor | None, width: int
) -> Tensor:
    """The final states of `causal_conv1d`, whose arguments these are: the last width - 1 tokens of
    the last document, before them the initial states or zeros.
    """
    batch, channels, length = x.shape
    last = x[:, :, max(length - width + 1, 0) :]
    if seq_idx is not None:
        same = (seq_idx == seq_idx[:, -1:])[:, None]
        last = last * same[:, :, length - last.shape[2] :]
    missing = width - 1 - last.shape[2]
    if missing == 0:
        return last.clone()
    if initial_states is None:
        initial_states = x.new_zeros(batch, channels, width - 1)
    history = initial_states[:, :, width - 1 - missing :].to(x.dtype)
    if seq_idx is not None:
        history = history * same[:, :, :1]  # the initial states are the first document's
    return torch.cat([history, last], dim=2)


@torch.no_grad()
def causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` for one new token; `conv_state` is updated in place. Inference only.

    Args:
        x: (batch, channels), the new token.
        conv_state: (batch, channels, size), size at least width - 1: the tokens before it, oldest
            first. With `conv_state_indices` (rows, channels, size), any number of rows.
        weight, bias, activation: as in `causal_conv1d`.
        conv_state_indices: (batch,) int32 or int64, the row of `conv_state` that belongs to each
            x, no row twice; the other rows stay as they are. An x whose row is -1 is padding: its y
            is zero.

    Returns:
        y with the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.
    """
    check_rank("x", x, "batch, channels")
    width = _check_weight(x, weight, bias, activation)
    rows = x.shape[0]
    check_rank("conv_state", conv_state, "rows, channels, size")
    if conv_state_indices is not None:
        rows = conv_state.shape[0]
        check_indices("conv_state_indices", conv_state_indices, x, rows)
    size = conv_state.shape[2]
    if size < width - 1:
        raise ValueError(f"conv_state: expected at least {width - 1} tokens, got {size}")
    check("conv_state", conv_state, (rows, x.shape[1], size), x)
    name = choose(x)
    with torch.autocast(x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.conv import fused  # here, since it needs triton

            return fused.conv_step(x, conv_state, weight, bias, activation, conv_state_indices)
        step = (reference if name == "reference" else eager).conv_step

        def run(indices: Tensor | None, x: Tensor) -> Tensor:
            return step(x, conv_state, weight, bias, activation, indices)

        return skip_padding(run, conv_state_indices, x)


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    """The width of the convolution, after the checks of what a sequence and a step share."""
    check_rank("weight", weight, "channels, width")
    channels, width = x.shape[1], weight.shape[1]
    if width < 2:
        raise ValueError(f"weight: expected a width of at least 2, got {width}")
    check("weight", weight, (channels, width), x)
    if bias is not None:
        check("bias", bias, (channels,), x)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return width
