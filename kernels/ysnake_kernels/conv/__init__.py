"""Causal depthwise convolution: arguments, checks, and the choice of implementation."""

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import INTEGERS, check, check_indices, check_rank, check_seq_idx
from ysnake_kernels.conv import eager, reference
from ysnake_kernels.conv.inputs import ConvInputs
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
        x: (batch, channels, length), any strides. Channel-last memory is the fast case.
        weight: (channels, width), width at least 2.
        bias: (channels,).
        seq_idx: (batch, length) int32 or int64, the document of each token, never decreasing. The
            tokens of one document do not change the outputs of another.
        initial_states: (batch, channels, width - 1), the tokens before the first one, oldest first.
            With `seq_idx` they belong to the first token's document. None means zeros.
        return_final_states: also return the last width - 1 tokens, the `initial_states` of what
            follows.
        activation: None, "silu" or "swish".

    Returns:
        y with the shape and dtype of x, or (y, final_states) with final_states
        (batch, channels, width - 1). With `seq_idx`, tokens of an earlier document are zeros there.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: the convolution of the Mamba-2 block, arXiv 2405.21060, section 7.
    """
    inputs = ConvInputs(x, weight, bias, seq_idx, initial_states, uses_silu(activation))
    check_conv(inputs)
    y, final_states = run(choose(x), inputs, return_final_states)
    if return_final_states and final_states is not None:
        return y, final_states
    return y


def run(name: str, inputs: ConvInputs, want_states: bool = False) -> tuple[Tensor, Tensor | None]:
    """The output and the final states of checked inputs, by the implementation `name`.

    The final states may be None unless `want_states` is true.
    """
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.conv import fused  # here, since it needs triton

            return fused.conv(inputs)
        y = (reference if name == "reference" else eager).conv(inputs)
        if not want_states:
            return y, None
        return y, last_tokens(inputs.x, inputs.initial_states, inputs.seq_idx, inputs.width)


def uses_silu(activation: str | None) -> bool:
    """Whether the argument `activation` asks for SiLU. Raises ValueError for other names."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_conv(inputs: ConvInputs) -> None:
    """Raise ValueError or TypeError where an argument of `causal_conv1d` is wrong."""
    x, seq_idx, initial_states = inputs.x, inputs.seq_idx, inputs.initial_states
    check_rank("x", x, "batch, channels, length")
    batch, channels, length = x.shape
    if length < 1:
        raise ValueError("x: expected a length of at least 1, got 0")
    width = _check_weight(x, inputs.weight, inputs.bias)
    if seq_idx is not None:
        check("seq_idx", seq_idx, (batch, length), x, dtypes=INTEGERS)
        check_seq_idx(seq_idx)
    if initial_states is not None:
        check("initial_states", initial_states, (batch, channels, width - 1), x)


def last_tokens(
    x: Tensor, initial_states: Tensor | None, seq_idx: Tensor | None, width: int
) -> Tensor:
    """The final states of `causal_conv1d`: the last width - 1 tokens of the last document.

    The arguments are those of `causal_conv1d`. Where the document has fewer tokens, the initial
    states or zeros come before them.
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
        history = history * same[:, :, :1]  # the initial states belong to the first document
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
            x. No row may come twice, and the other rows stay as they are. An x whose row is -1 is
            padding, and its y is zero.

    Returns:
        y with the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.
    """
    check_rank("x", x, "batch, channels")
    width = _check_weight(x, weight, bias)
    silu = uses_silu(activation)
    rows = x.shape[0]
    check_rank("conv_state", conv_state, "rows, channels, size")
    if conv_state_indices is not None:
        rows = conv_state.shape[0]
        check_indices("conv_state_indices", conv_state_indices, x, rows)
    size = conv_state.shape[2]
    if size < width - 1:
        raise ValueError(f"conv_state: expected at least {width - 1} tokens, got {size}")
    check("conv_state", conv_state, (rows, x.shape[1], size), x)
    return run_step(choose(x), x, conv_state, weight, bias, silu, conv_state_indices)


def run_step(
    name: str,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_step` of checked arguments, by the implementation `name`."""
    with torch.autocast(x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.conv import fused  # here, since it needs triton

            return fused.conv_step(x, conv_state, weight, bias, silu, indices)
        step = (reference if name == "reference" else eager).conv_step

        def of_rows(indices: Tensor | None, x: Tensor) -> Tensor:
            return step(x, conv_state, weight, bias, silu, indices)

        return skip_padding(of_rows, conv_state, indices, x)


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The width of the convolution, after the checks that a sequence and a step share."""
    check_rank("weight", weight, "channels, width")
    channels, width = x.shape[1], weight.shape[1]
    if width < 2:
        raise ValueError(f"weight: expected a width of at least 2, got {width}")
    check("weight", weight, (channels, width), x)
    if bias is not None:
        check("bias", bias, (channels,), x)
    return width
