"""Matrix products in Triton kernels: which GPU runs them, in which dtype, how exact."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@cache
def family_and_processors(place: torch.device) -> tuple[str, int]:
    """A device's family ("sm_80", "sm_90", ..., "gfx942") and its number of multiprocessors."""
    if place.type != "cuda":
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(place)
    if torch.version.hip:
        family = properties.gcnArchName.split(":")[0]
    else:  # gcnArchName of an NVIDIA card is the card's name
        family = f"sm_{properties.major}{properties.minor}"
    return family, properties.multi_processor_count


def tf32_is_allowed() -> bool:
    """Whether the user lets float32 products on a GPU round to tf32.

    torch has two settings for it, an older and a newer one. This reads both.
    torch.get_float32_matmul_precision() would raise where the newer one was used.
    """
    asked = torch.backends.cuda.matmul.fp32_precision
    if asked == "none":
        asked = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return asked == "tf32"


@cache
def arithmetic(family: str, tf32: bool, *dtypes: torch.dtype | None) -> tuple[Any, Any, str]:
    """The accumulator's dtype, and the dtype and precision of matrix products.

    Args:
        family: of the device.
        tf32: whether the user lets float32 products round to tf32.
        dtypes: of the three tensors that are multiplied, then of the other inputs (None if absent).
    """
    if torch.float64 in dtypes:
        return tl.float64, tl.float64, "ieee"
    if set(dtypes[:3]) == {torch.bfloat16}:
        return tl.float32, tl.bfloat16, "ieee"
    # tf32 represents every float16 number. Unlike float16 it also holds large states and gradients.
    fast = tf32 or set(dtypes[:3]) == {torch.float16}
    fast &= not family.startswith("gfx") or family == "gfx942"  # other AMD cards have no tf32
    return tl.float32, tl.float32, "tf32" if fast else "ieee"


@triton.jit
def dot(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b. The factors are rounded to OPERAND, and summed in float32 (float64 for float64).

    OPERAND and PRECISION are what `arithmetic` returns. acc may be None, which means zero.
    """
    a, b = a.to(OPERAND), b.to(OPERAND)
    if INTERPRETED and tl.bfloat16 == OPERAND:  # the interpreter multiplies the bits of a bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if tl.float64 == OPERAND:
        product = tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        product = tl.dot(a, b, acc, input_precision=PRECISION)
    return product
