"""Matrix products in 16 bits, as `--precision` asks.

State, decays, sums, norms, the residual stream and the optimizer stay in float32 everywhere.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ysnake.shared.processor import (
    LEAST_GAIN,
    bfloat16_products,
    gain_of_16_bits,
    rounded_products,
)
from ysnake.training.options import Precision

if TYPE_CHECKING:
    import torch
    from rich.console import Console


def choose_precision(precision: Precision, device: str) -> tuple[Precision, list[str]]:
    """What `auto` comes to in a new run on a CPU, and what to tell the user.

    It comes to bfloat16 where that is faster. Otherwise the run keeps `auto`: float32 on a CPU,
    bfloat16 if it is resumed on a GPU.
    """
    if precision != "auto" or device != "cpu" or not bfloat16_products():
        return precision, []
    gain = gain_of_16_bits()
    if gain < LEAST_GAIN:
        return precision, []
    fast = f"matrix products in bfloat16, {gain:.1f} times as fast here"
    return "bfloat16", [f"{fast}; --precision float32 is exact"]


def autocast(precision: str, device: "torch.device") -> "AbstractContextManager[object]":
    """A context in which products are in bfloat16, on a GPU. On a CPU see `products_as`."""
    import torch

    chosen = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    if not chosen or device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def products_as(
    precision: str, device: "torch.device", console: "Console"
) -> AbstractContextManager[object]:
    """A context in which a CPU rounds the factors of products, if `precision` is bfloat16.

    Only what a mixer stores for its backward pass is then in bfloat16, which takes half the memory.
    """
    if precision != "bfloat16" or device.type != "cpu":
        return nullcontext()
    if not bfloat16_products():
        console.print(
            "warning: --precision bfloat16: this CPU has no products in 16 bits, so it computes "
            "them in float32; what a step stores for its backward pass is in 16 bits"
        )
    return rounded_products()
