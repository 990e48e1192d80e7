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
from ysnake_kernels.ssd.inputs import ScanInputs


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
    inputs = ScanInputs(
        *(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens),
        *(chunk_size, bool(dt_softplus), check_limit(dt_limit)),
    )
    check_scan(inputs)
    y, states = run(choose(x), inputs)
    return (y, states) if return_final_states else y


def run(name: str, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y and the final states of checked inputs, by the implementation `name`."""
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.ssd import fused  # only where it runs: it needs triton

            return fused.scan(inputs)
        return (reference if name == "reference" else eager_operator).scan(inputs)


def check_scan(inputs: ScanInputs) -> None:
    """Raise ValueError or TypeError unless these are arguments that `ssd_scan` takes."""
    x = inputs.x
    check_rank("x", x, "batch, length, heads, P")
    batch, length, heads, head_dim = x.shape
    if length < 1:
        raise ValueError("x: expected a length of at least 1, got 0")
    check("dt", inputs.dt, (batch, length, heads), x)
    check("A", inputs.A, (heads,), x)
    check_decay(inputs.A)
    check_rank("B", inputs.B, "batch, length, groups, N")
    groups, state = inputs.B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups dividing {heads} heads, got {groups}")
    check("B", inputs.B, (batch, length, groups, state), x)
    check("C", inputs.C, (batch, length, groups, state), x, match="B")
    check_whole("chunk_size", inputs.chunk_size)
    check_skip(inputs.D, heads, head_dim, x)
    if inputs.z is not None:
        check("z", inputs.z, tuple(x.shape), x)
    if inputs.dt_bias is not None:
        check("dt_bias", inputs.dt_bias, (heads,), x)
    check_limit(inputs.dt_limit)
    if inputs.cu_seqlens is not None:
        _check_cu_seqlens(inputs.cu_seqlens, x, inputs.seq_idx)
    if inputs.initial_states is not None:
        shape = (inputs.sequences, heads, head_dim, state)
        check("initial_states", inputs.initial_states, shape, x)
    if inputs.seq_idx is not None:
        check("seq_idx", inputs.seq_idx, (batch, length), x, dtypes=INTEGERS)
        check_seq_idx(inputs.seq_idx)


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, seq_idx: Tensor | None) -> None:
    """Raise unless `cu_seqlens` cuts the length of x into sequences."""
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
