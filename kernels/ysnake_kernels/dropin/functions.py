"""The functions of mamba_ssm and causal-conv1d, with their arguments, made of our operators.

Signatures are written out, since callers look at them to choose their keywords. Three things
differ from the originals. A `chunk_size` is accepted and not used: the implementation chooses one,
and the result does not depend on it. Packed sequences may be combined with states. And everything
works on any device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels import conv, mixer, step
from ysnake_kernels.backend import choose
from ysnake_kernels.checks import (
    INTEGERS,
    check,
    check_decay,
    check_indices,
    check_rank,
    check_whole,
)
from ysnake_kernels.norm import rms_norm_gated
from ysnake_kernels.numerics import accumulator, step_sizes
from ysnake_kernels.padding import documents_before_padding, skip_padding
from ysnake_kernels.ssd import ssd_scan
from ysnake_kernels.step.inputs import StepInputs

NO_LIMIT = (-torch.inf, torch.inf)  # of step sizes


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ysnake_kernels.causal_conv1d`. `final_states_out` receives the final states.

    Tokens at the end whose `seq_idx` is -1 are padding. Their outputs are zero.
    """
    seq_idx, padding = _without_padding(seq_idx)
    options = (initial_states, return_final_states, activation)
    out = conv.causal_conv1d(x, weight, bias, seq_idx, *options)
    y, states = out if isinstance(out, tuple) else (out, None)
    if padding is not None:
        y = y.masked_fill(padding[:, None], 0)
    if states is None:
        return y
    return y, states if final_states_out is None else final_states_out.copy_(states)


def _without_padding(seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """seq_idx and the mask of its padding, from `documents_before_padding`.

    Without integers the argument is returned as it is, with no mask. Later checks refuse it.
    """
    if isinstance(seq_idx, Tensor) and seq_idx.dtype in INTEGERS:
        return documents_before_padding(seq_idx)
    return seq_idx, None


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of one or some new tokens; `conv_state` is updated in place.

    Args:
        x: (batch, channels) or (batch, channels, tokens).
        conv_state: (batch, channels, size) with size >= width - 1, the tokens before, oldest first.
        weight, bias, activation: as in `causal_conv1d`.
        cache_seqlens: (batch,), the number of tokens so far. With it conv_state is a ring buffer:
            token t is at t % size.
        conv_state_indices: (batch,), the row of conv_state that belongs to each x; -1 is padding,
            whose y is zero.

    Returns:
        y with the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.
    """
    check_rank("conv_state", conv_state, "batch, channels, size")
    check_rank("weight", weight, "channels, width")
    size, width = conv_state.shape[-1], weight.shape[-1]
    tokens = x[..., None] if isinstance(x, Tensor) and x.ndim == 2 else x
    check_rank("x", tokens, "batch, channels, tokens")
    if tokens.shape[2] == 1 and cache_seqlens is None:
        options = (weight, bias, activation, conv_state_indices)
        return conv.causal_conv1d_step(tokens[..., 0], conv_state, *options).view(x.shape)
    if size < width - 1:
        raise ValueError(f"conv_state: expected at least {width - 1} tokens, got {size}")
    batch, channels, _ = tokens.shape
    rows = batch
    if conv_state_indices is not None:
        rows = conv_state.shape[0]
        check_indices("conv_state_indices", conv_state_indices, tokens, rows)
    check("conv_state", conv_state, (rows, channels, size), tokens)
    if cache_seqlens is not None:
        check("cache_seqlens", cache_seqlens, (batch,), tokens, dtypes=INTEGERS)

    def run(indices: Tensor | None, tokens: Tensor, seqlens: Tensor | None) -> Tensor:
        return _update(tokens, conv_state, weight, bias, activation, seqlens, indices)

    y = skip_padding(run, conv_state, conv_state_indices, tokens, cache_seqlens)
    return y[..., 0] if x.ndim == 2 else y


def _update(
    tokens: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` of tokens (batch, channels, tokens), none of them padding."""
    size, width = conv_state.shape[-1], weight.shape[-1]
    state = conv_state if indices is None else conv_state[indices]
    if cache_seqlens is None:
        history = state[..., size - width + 1 :]
        state = torch.cat([state, tokens.to(state.dtype)], dim=2)[..., -size:]
    else:
        times = torch.arange(1 - width, tokens.shape[2], device=tokens.device)
        places = ((cache_seqlens[:, None] + times) % size)[:, None].expand(-1, tokens.shape[1], -1)
        history = state.gather(2, places[..., : width - 1])
        new = min(size, tokens.shape[2])  # older ones are overwritten at once
        state = state.scatter(2, places[..., -new:], tokens[..., -new:].to(state.dtype))
    y = conv.causal_conv1d(tokens, weight, bias, None, history, activation=activation)
    assert isinstance(y, Tensor)
    if indices is None:
        conv_state.copy_(state)
    else:
        conv_state[indices] = state
    return y


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last tokens of each packed sequence, with zeros before short ones.

    Args:
        x: (tokens, channels), the sequences in a row.
        cu_seqlens: (sequences + 1,), where they begin and end.
        state_len: how many tokens of each.

    Returns:
        (sequences, channels, state_len).
    """
    check_rank("x", x, "tokens, channels")
    check_whole("state_len", state_len)
    check("cu_seqlens", cu_seqlens, (cu_seqlens.numel(),), x, dtypes=INTEGERS)
    places = cu_seqlens[1:, None] + torch.arange(-state_len, 0, device=x.device)
    inside = places >= cu_seqlens[:-1, None]
    states = x[places.clamp(min=0)] * inside[..., None].to(x.dtype)
    return states.transpose(1, 2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`ysnake_kernels.ssd_scan`, with the states after each packed sequence on request.

    Args:
        seq_idx: as in `ssd_scan`. Tokens at the end with -1 are padding, and their y is zero.
        cu_seqlens: (sequences + 1,), where the packed sequences of a batch of one begin and end.
            They do not see each other. It is not needed where `seq_idx` says the same.
        return_varlen_states: also return the state after each sequence of `cu_seqlens`.
        state_dtype: of the returned states; None means float32 (float64 if an input is).

    Returns:
        y, or a tuple of y, the final states (batch, heads, P, N) if asked for, and the states after
        each sequence (sequences, heads, P, N) if asked for.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states: expected cu_seqlens with it, got None")
    if seq_idx is not None and cu_seqlens is not None:
        if return_varlen_states:
            seq_idx = None
        else:
            cu_seqlens = None
    seq_idx, padding = _without_padding(seq_idx)
    y, states = ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    if padding is not None:
        y = y.masked_fill(padding[..., None, None], 0)
    states = states if state_dtype is None else states.to(state_dtype)
    out: tuple[Tensor, ...] = (y,)
    if return_final_states:
        out += (states if cu_seqlens is None else states[-1:],)
    if return_varlen_states:
        out += (states,)
    return y if len(out) == 1 else out


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ysnake_kernels.mamba_split_conv1d_scan_combined`, which chooses its own chunk size.

    With `headdim`, zxbcdt may start with more features than the mixer needs. They are two halves z0
    and x0. The output projection then gets silu(z0) * x0, followed by the mixer's features. Tokens
    at the end whose `seq_idx` is -1 are padding. Their outputs are zero.
    """
    seq_idx, padding = _without_padding(seq_idx)
    weights = (conv1d_weight, conv1d_bias, dt_bias, A, D)
    options: dict[str, Any] = {
        "initial_states": initial_states,
        "seq_idx": seq_idx,
        "dt_limit": dt_limit,
        "return_final_states": return_final_states,
        "activation": activation,
        "rmsnorm_weight": rmsnorm_weight,
        "rmsnorm_eps": rmsnorm_eps,
        "headdim": headdim,
        "ngroups": ngroups,
        "norm_before_gate": norm_before_gate,
    }
    spare, gated = 0, None
    if headdim is not None:
        d_inner = headdim * A.shape[0]
        spare = zxbcdt.shape[-1] - d_inner - conv1d_weight.shape[0] - A.shape[0]
    if spare > 0 and spare % 2 == 0:
        gated, zxbcdt = zxbcdt.tensor_split([spare], dim=-1)
    else:
        options |= {"outproj_weight": outproj_weight, "outproj_bias": outproj_bias}
    out = mixer.mamba_split_conv1d_scan_combined(zxbcdt, *weights, **options)
    y, states = out if isinstance(out, tuple) else (out, None)
    if gated is not None:
        z0, x0 = gated.chunk(2, dim=-1)
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        y = y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
    if padding is not None:
        y = y.masked_fill(padding[..., None], 0)
    return y if states is None else (y, states)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the recurrence, of Mamba-2 or of Mamba-1; `state` is updated in place.

    Args:
        state: (batch, heads, P, N); Mamba-1: (batch, channels, N).
        x, z: (batch, heads, P); Mamba-1: (batch, channels).
        dt: shape of x. In Mamba-2 all channels of a head share a value, repeated by `expand`.
        A: (heads, P, N), repeated likewise; Mamba-1: (channels, N).
        B, C: (batch, groups, N); Mamba-1: (batch, N), or with groups.
        D, dt_bias: (heads, P); Mamba-1: (channels,).
        state_batch_indices: (batch,), the row of `state` that belongs to each x; -1 is padding,
            whose y is zero.

    Returns:
        y with the shape and dtype of x.
    """
    options = state_batch_indices, dt_softplus, NO_LIMIT
    inputs = StepInputs(state, x, dt, A, B, C, D, z, dt_bias, *options)
    _check_update(inputs)
    if x.ndim == 3 and _repeats(A, (1, 2)) and _repeats(dt, (2,)) and _repeats(dt_bias, (1,)):
        contiguous = state.contiguous()
        y = step.run(choose(x), _of_heads(inputs._replace(state=contiguous)))
        if contiguous is not state:
            state.copy_(contiguous)
        return y

    def run(indices, x, dt, B, C, z) -> Tensor:
        tokens = inputs._replace(x=x, dt=dt, B=B, C=C, z=z, indices=indices)
        return _update_each_channel(tokens)

    with torch.autocast(x.device.type, enabled=False):
        return skip_padding(run, state, state_batch_indices, x, dt, B, C, z)


def _of_heads(inputs: StepInputs) -> StepInputs:
    """The inputs of `ssd_step`, from those in which the values of a head are repeated."""
    A, B, C, dt_bias = inputs.A[:, 0, 0], inputs.B, inputs.C, inputs.dt_bias
    check_decay(A)
    return inputs._replace(
        dt=inputs.dt[..., 0],
        A=A,
        B=B if B.ndim == 3 else B[:, None],
        C=C if C.ndim == 3 else C[:, None],
        dt_bias=None if dt_bias is None else dt_bias[:, 0],
    )


def _update_each_channel(inputs: StepInputs) -> Tensor:
    """`selective_state_update` with a rate and a step size for each channel, without padding."""
    state, x, dt, A, B, C, D, z, dt_bias, indices, dt_softplus, dt_limit = inputs
    acc = accumulator(state, x)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, acc)
    u, S = x.to(acc), (state if indices is None else state[indices]).to(acc)
    B, C = B.to(acc), C.to(acc)
    if B.ndim == 2:
        B, C = B[:, None], C[:, None]
    elif (per_group := x.shape[1] // B.shape[1]) > 1:
        B, C = (t.repeat_interleave(per_group, dim=1) for t in (B, C))
    if x.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    S.mul_((dt[..., None] * A.to(acc)).exp_()).addcmul_((dt * u)[..., None], B)
    y = torch.matmul(S, C.transpose(-1, -2))[..., 0] if C.shape[-2] == 1 else (S * C).sum(-1)
    if D is not None:
        y = y.addcmul_(u, D.to(acc))
    if z is not None:
        y = y.mul_(F.silu(z.to(acc)))
    if indices is not None:
        state[indices] = S.to(state.dtype)
    elif S is not state:
        state.copy_(S)
    return y.to(x.dtype)


def _check_update(inputs: StepInputs) -> None:
    """The checks of `selective_state_update`."""
    state, x, dt, A, B, C, D, z, dt_bias, indices, *_ = inputs
    of_heads = isinstance(x, Tensor) and x.ndim == 3
    check_rank("x", x, "batch, heads, P" if of_heads else "batch, channels")
    batch, *features = x.shape
    rows = batch
    if indices is not None:
        check_rank("state", state, "rows, heads, P, N" if of_heads else "rows, channels, N")
        rows = state.shape[0]
        check_indices("state_batch_indices", indices, x, rows)
    n = state.shape[-1] if isinstance(state, Tensor) and state.ndim else 0
    check("state", state, (rows, *features, n), x)
    check("dt", dt, tuple(x.shape), x)
    check("A", A, (*features, n), x)
    groups = B.shape[1:2] if isinstance(B, Tensor) and B.ndim == 3 else ()
    if groups and (groups[0] < 1 or features[0] % groups[0]):
        expected = f"dividing {features[0]} heads" if x.ndim == 3 else f"dividing {features[0]}"
        raise ValueError(f"B: expected a number of groups {expected}, got {groups[0]}")
    for name, tensor in (("B", B), ("C", C)):
        check(name, tensor, (batch, *groups, n), x)
    optional = (("D", D, features), ("z", z, x.shape), ("dt_bias", dt_bias, features))
    for name, given, shape in optional:
        if given is not None:
            check(name, given, tuple(shape), x)


def _repeats(tensor: Tensor | None, axes: tuple[int, ...]) -> bool:
    """Whether the axes repeat one value in memory, as `expand` does."""
    return tensor is None or all(tensor.stride(i) == 0 or tensor.shape[i] == 1 for i in axes)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`ysnake_kernels.rms_norm_gated`."""
    return rms_norm_gated(x, weight, bias, z, eps, group_size, norm_before_gate)
