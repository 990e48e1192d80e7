"""The SSD scan over a sequence: arguments, checks, and the choice of implementation."""

from itertools import pairwise

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import (
    INTEGERS,
    check,
    check_decay,
    check_limit,
    check_rank,
    check_seq_idx,
    check_skip,
    check_whole,
    values_can_be_checked,
)
from ysnake_kernels.ssd import eager_operator, reference
from ysnake_kernels.ssd.sequences import scan_each


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's selective state-space layer over whole sequences.

    For every head, with dt = clamp(softplus(dt + dt_bias)) and a state S of shape (N, P):

        S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T        y_t = (C_t^T S_t + D x_t) * silu(z_t)

    Names and layouts are those of mamba_ssm's `mamba_chunk_scan_combined`. Inputs may be float64,
    float32, bfloat16 or float16; dt, decays and states are computed in float32 (float64 if an
    input is). Differentiable once in every floating-point argument.

    Args:
        x: (batch, length, heads, P), length at least 1.
        dt: (batch, length, heads), the step sizes, in units of the continuous time of A.
        A: (heads,), at most 0.
        B, C: (batch, length, groups, N); groups divides heads.
        chunk_size: tokens per chunk of the quadratic form; None lets the implementation choose.
            The result does not depend on it beyond rounding.
        D: (heads,) or (heads, P), the skip connection.
        z: shape of x, the gate.
        dt_bias: (heads,), added to dt first.
        initial_states: (batch, heads, P, N), the state before the first token; with `seq_idx` it
            belongs to the first token's document, with `cu_seqlens` it is (sequences, heads, P, N).
        seq_idx: (batch, length) int32 or int64, the document of each token, never decreasing; the
            state starts at zero where a new document starts.
        cu_seqlens: (sequences + 1,) int32 or int64, with batch 1: sequence k is
            [cu_seqlens[k], cu_seqlens[k + 1]) of the length, and may be empty. Excludes `seq_idx`.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: dt is clamped to this range last.
        return_final_states: also return the states after the last token.

    Returns:
        y with the shape and dtype of x, or (y, states) with states (batch, heads, P, N), or
        (sequences, heads, P, N) with `cu_seqlens`, in float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: Dao and Gu, arXiv 2405.21060, section 6 (block decomposition of SSD).
    """
    check_scan(
        *(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_limit)
    )
    arguments = (x, dt, A, B, C, chunk_size, D, z, initial_states, seq_idx)
    options = (dt_bias, dt_softplus, dt_limit)
    name = choose(x)
    with torch.autocast(x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.ssd import fused  # only where it runs: it needs triton

            y, states = fused.scan(*arguments, *options, cu_seqlens=cu_seqlens)
        elif name == "eager":
            y, states = eager_operator.scan(*arguments, *options, cu_seqlens=cu_seqlens)
        elif cu_seqlens is None:
            y, states = reference.scan(*arguments, *options)
        else:
            y, states = scan_each(reference.scan, cu_seqlens, *arguments, *options)
    return (y, states) if return_final_states else y


def check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    """The checks of `ssd_scan`'s arguments."""
    check_rank("x", x, "batch, length, heads, P")
    batch, length, heads, head_dim = x.shape
    if length < 1:
        raise ValueError("x: expected a length of at least 1, got 0")
    check("dt", dt, (batch, length, heads), x)
    check("A", A, (heads,), x)
    check_decay(A)
    check_rank("B", B, "batch, length, groups, N")
    groups, state = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups dividing {heads} heads, got {groups}")
    check("B", B, (batch, length, groups, state), x)
    check("C", C, (batch, length, groups, state), x, match="B")
    check_whole("chunk_size", chunk_size)
    check_skip(D, heads, head_dim, x)
    if z is not None:
        check("z", z, tuple(x.shape), x)
    if dt_bias is not None:
        check("dt_bias", dt_bias, (heads,), x)
    check_limit(dt_limit)
    sequences = batch
    if cu_seqlens is not None:
        sequences = _check_cu_seqlens(cu_seqlens, x, seq_idx)
    if initial_states is not None:
        check("initial_states", initial_states, (sequences, heads, head_dim, state), x)
    if seq_idx is not None:
        check("seq_idx", seq_idx, (batch, length), x, dtypes=INTEGERS)
        check_seq_idx(seq_idx)


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, seq_idx: Tensor | None) -> int:
    """The number of packed sequences, after the checks of cu_seqlens."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if seq_idx is not None:
        raise ValueError("cu_seqlens: expected without seq_idx, got both")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected x with batch 1, got batch {x.shape[0]}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        shape = tuple(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {shape}")
    check("cu_seqlens", cu_seqlens, tuple(cu_seqlens.shape), x, dtypes=INTEGERS)
    if values_can_be_checked(cu_seqlens):
        bounds = cu_seqlens.tolist()
        rising = all(a <= b for a, b in pairwise(bounds))
        if not rising or bounds[0] != 0 or bounds[-1] != x.shape[1]:
            length = x.shape[1]
            raise ValueError(
                f"cu_seqlens: expected values from 0 to length {length} that never decrease, "
                f"got {bounds}"
            )
    return len(cu_seqlens) - 1
