"""Mamba-1's selective scan over a sequence: arguments, checks, and the choice of implementation."""

import math

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import check, check_decay, check_rank
from ysnake_kernels.numerics import accumulator, step_sizes
from ysnake_kernels.selective_scan import eager, reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1's selective state-space layer over whole sequences.

    Every channel has a state S of N numbers, and each number has a decay of its own:

        S_t = exp(delta_t A) S_(t-1) + delta_t B_t u_t        y_t = (C_t S_t + D u_t) * silu(z_t)

    Names and layouts are those of mamba_ssm's `selective_scan_fn`. Inputs may be float64, float32,
    bfloat16 or float16; steps, decays and states are computed in float32 (float64 if an input is).
    Differentiable once in every floating-point argument. It has no Triton kernel: the eager
    implementation runs on a GPU too.

    Args:
        u: (batch, channels, length), length at least 1, any strides.
        delta: shape of u, the step sizes.
        A: (channels, N), real, at most 0.
        B, C: (batch, N, length), or (batch, groups, N, length) where groups divides channels.
        D: (channels,), the skip connection.
        z: shape of u, the gate.
        delta_bias: (channels,), added to delta first.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last token.

    Returns:
        y with the shape and dtype of u, or (y, state) with state (batch, channels, N) in float32
        (float64 if an input is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.
        RuntimeError: the `fused` implementation is forced on a CPU.

    Source: Gu and Dao, arXiv 2312.00752, section 3.
    """
    B, C = (t[:, None] if isinstance(t, Tensor) and t.ndim == 3 else t for t in (B, C))
    _check(u, delta, A, B, C, D, z, delta_bias)
    name = choose(u)
    if name == "fused" and u.device.type == "cpu":
        raise RuntimeError("backend 'fused': selective_scan has no Triton kernel; choose 'eager'")
    scan = reference.scan if name == "reference" else eager.scan
    with torch.autocast(u.device.type, enabled=False):
        exact = accumulator(u, delta, A, B, C, D, z, delta_bias)
        bias = None if delta_bias is None else delta_bias[:, None]
        dt = step_sizes(delta, bias, delta_softplus, (-math.inf, math.inf), exact)
        y, state = scan(u, dt, A, B, C, D, z)
    return (y, state) if return_last_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """The checks of `selective_scan`'s arguments; B and C have groups."""
    check_rank("u", u, "batch, channels, length")
    batch, channels, length = u.shape
    if length < 1:
        raise ValueError("u: expected a length of at least 1, got 0")
    check("delta", delta, (batch, channels, length), u, match="u")
    for name, tensor in (("A", A), ("B", B), ("C", C)):
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
    check_rank("A", A, "channels, N")
    n = A.shape[1]
    check("A", A, (channels, n), u, match="u")
    check_decay(A)
    for name, tensor in (("B", B), ("C", C)):
        check_rank(name, tensor, "batch, groups, N, length")
    groups = B.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"B: expected a number of groups dividing {channels}, got {groups}")
    check("B", B, (batch, groups, n, length), u, match="u and A")
    check("C", C, (batch, groups, n, length), u, match="B")
    for name, given in (("D", D), ("delta_bias", delta_bias)):
        if given is not None:
            check(name, given, (channels,), u, match="u")
    if z is not None:
        check("z", z, (batch, channels, length), u, match="u")
