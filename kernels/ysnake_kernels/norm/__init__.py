"""Gated RMSNorm: arguments, checks, and the choice of implementation."""

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import FLOATS, check
from ysnake_kernels.norm import eager, reference
from ysnake_kernels.norm.inputs import NormInputs, plain_norm


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm over groups of the last dimension, gated by silu(z) before or after.

    With `norm_before_gate`: y = (normalise(x) * weight + bias) * silu(z). Without, as in Mamba-2:
    y = normalise(x * silu(z)) * weight + bias. Here normalise(v) = v / sqrt(mean(v^2) + eps), with
    the mean over each group. Names follow mamba_ssm's `rmsnorm_fn`. Computed in float32 (float64 if
    an input is). Differentiable once in x, weight, bias and z.

    Args:
        x: (..., features).
        weight: (features,).
        bias: (features,).
        z: shape of x. None means no gate.
        eps: added to the mean square.
        group_size: the number of features in a group, a divisor of features. None means all.
        norm_before_gate: see above.
        out_dtype: of the result; None means that of x.

    Returns:
        the shape of x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: Zhang and Sennrich, arXiv 1910.07467; the gate, arXiv 2405.21060, section 7.1.
    """
    _check_x(x)
    features = x.shape[-1]
    group_size = features if group_size is None else group_size
    inputs = NormInputs(x, weight, bias, z, eps, group_size, norm_before_gate)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_norm(inputs, out_dtype)
    return run(choose(x), inputs, out_dtype)


def run(name: str, inputs: NormInputs, out_dtype: torch.dtype) -> Tensor:
    """The norm of checked inputs, by the implementation `name`."""
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "fused":
            from ysnake_kernels.norm import fused  # here, since it needs triton

            return fused.norm(inputs, out_dtype)
        return (reference if name == "reference" else eager).norm(inputs, out_dtype)


def _check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {got}")
    if x.ndim < 1:
        raise ValueError("x: expected shape (..., features), got ()")


def check_norm(inputs: NormInputs, out_dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError where an argument of `rms_norm_gated` is wrong."""
    x, weight, bias, z, eps, group_size, _ = inputs
    features = x.shape[-1]
    check("weight", weight, (features,), x)
    if bias is not None:
        check("bias", bias, (features,), x)
    if z is not None:
        check("z", z, tuple(x.shape), x)
    if not isinstance(group_size, int):
        raise TypeError(f"group_size: expected a whole number, got {group_size!r}")
    if not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    if group_size < 1 or features % group_size:
        raise ValueError(f"group_size: expected a divisor of {features} features, got {group_size}")
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: expected a floating-point dtype, got {out_dtype}")


def add_and_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum x + added in x's dtype, and its norm in `out_dtype`. Not differentiable.

    Args:
        x: (..., features).
        added: shape of x, in x's dtype or one with fewer bits. None means that the sum is x itself.
        weight: (features,).
        eps: added to the mean square.
    """
    if choose(x) == "fused" and not torch.compiler.is_compiling():
        from ysnake_kernels.norm import fused

        return fused.add_and_norm(plain_norm(x, weight, eps), added, out_dtype)
    total = x if added is None else x + added
    return total, rms_norm_gated(total, weight, eps=eps, out_dtype=out_dtype)
