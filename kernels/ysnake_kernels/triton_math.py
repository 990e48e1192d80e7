"""Arithmetic that several Triton kernels share."""

import triton
import triton.language as tl

# A launch option: a multiply-add rounds once. Triton 3.10 and later need it set.
ROUND_ONCE = {"enable_fp_fusion": True}


@triton.jit
def softplus(v):
    """log(1 + exp(v)), accurate where exp(v) is tiny."""
    e = tl.exp(-tl.abs(v))
    u = 1 + e  # its rounding error cancels in log(u) e / (u - 1)
    log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))
    return tl.where(v > 0, v, 0) + log1p


@triton.jit
def clamp(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """v within the limits; unlike with tl.minimum and tl.maximum, a NaN stays one."""
    v = tl.where(v < LOW, tl.full([], LOW, v.dtype), v)
    return tl.where(v > HIGH, tl.full([], HIGH, v.dtype), v)


@triton.jit
def finite(A):
    """A with a huge negative number instead of -inf, so that a step of size zero has no decay."""
    return tl.where(A < -1e30, tl.full([], -1e30, A.dtype), A)


@triton.jit
def silu(v):
    """v sigmoid(v)."""
    return v * tl.sigmoid(v)


@triton.jit
def silu_slope(v):
    """The derivative of silu at v."""
    sigmoid = tl.sigmoid(v)
    return sigmoid * (1 + v * (1 - sigmoid))
