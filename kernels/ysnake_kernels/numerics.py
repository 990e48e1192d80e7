"""Numbers that all implementations compute alike: dtypes, step sizes, decays, sizes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_LOG_DECAY = -60.0
"""Its exponential is as good as zero, even as a factor of large states.

Exponentials of less may give denormal numbers in later products, with which a CPU is ten times
slower.
"""


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums, exponents and states: float64 if any input is float64, else float32."""
    doubles = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if doubles else torch.float32


def step_sizes(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """dt as the recurrence uses it, in `dtype`: clamp(softplus(dt + dt_bias), *dt_limit)."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


def finite_rates(A: Tensor) -> Tensor:
    """A with the lowest finite number for -inf, so that a step of size zero has no decay."""
    return A.clamp(min=torch.finfo(A.dtype).min)


def log_decays(dt: Tensor, A: Tensor) -> Tensor:
    """dt A in dt's dtype, at least SMALLEST_LOG_DECAY.

    Scans add up log decays and take differences of the sums. After one huge number in a sum the
    differences would lose their precision.
    """
    return (dt * finite_rates(A.to(dt.dtype))).clamp_(min=SMALLEST_LOG_DECAY)


def sums_of_log_decays(log_decays: Tensor, dim: int) -> Tensor:
    """The cumulative sums along `dim`, added up in float64 and rounded once.

    Apple's GPUs have no float64. There they are added up in the dtype of `log_decays`.
    """
    exact = log_decays.dtype if log_decays.device.type == "mps" else torch.float64
    return log_decays.cumsum(dim, dtype=exact).to(log_decays.dtype)


def step_sizes_backward(
    grad: Tensor,
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """The gradient of dt, in grad's dtype, from the gradient of `step_sizes`.

    The gradient of dt_bias is its sum over batch and length.
    """
    dt = dt.to(grad.dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(grad.dtype)
    sizes = F.softplus(dt) if dt_softplus else dt
    low, high = dt_limit
    grad = grad * ((sizes >= low) & (sizes <= high))
    return grad * torch.sigmoid(dt) if dt_softplus else grad


def common_unit(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides."""
    return math.gcd(16, *strides)


def ceil_divide(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes several microseconds on the host."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
