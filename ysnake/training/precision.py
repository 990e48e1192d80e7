"""Matrix products in 16 bits, as `--precision` asks.

State, decays, sums, norms, the residual stream and the optimizer stay in float32 everywhere.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ysnake.shared.processor import bfloat16_products
from ysnake.training.options import Precision

if TYPE_CHECKING:
    import torch
    from rich.console import Console

LEAST_GAIN = 1.2  # 16-bit products have to be this many times as fast
MEASURED = (1024, 512, 1024)  # rows, inputs and outputs of the product that is timed
TIMES = 5


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


def gain_of_16_bits() -> float:
    """How many times as fast products are here when their factors are rounded to bfloat16."""
    import torch

    rows, inputs, outputs = MEASURED
    x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    before = torch.get_float32_matmul_precision()
    least: dict[str, float] = {}
    try:
        for precision in ("highest", "medium") * TIMES:  # the least time of each counts
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            took = max(time.perf_counter() - start, 1e-9)
            least[precision] = min(least.get(precision, took), took)
    finally:
        torch.set_float32_matmul_precision(before)
    return least["highest"] / least["medium"]


def autocast(precision: str, device: "torch.device") -> "AbstractContextManager[object]":
    """A context in which products are in bfloat16, on a GPU. On a CPU see `rounded_products`."""
    import torch

    chosen = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    if not chosen or device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def rounded_products(precision: str, device: "torch.device", console: "Console") -> Iterator[None]:
    """While the block runs, a CPU rounds the factors of its products, if `precision` is bfloat16.

    Tensors stay float32, and so do the sums of the products. This is faster than autocast on a
    CPU. Only what a mixer stores for its backward pass is in bfloat16, which takes half the memory.
    It is a setting of torch for the whole process. The block restores it at its end.
    """
    import torch

    if precision != "bfloat16" or device.type != "cpu":
        yield
        return
    if not bfloat16_products():
        console.print(
            "warning: --precision bfloat16: this CPU has no products in 16 bits, so it computes "
            "them in float32; what a step stores for its backward pass is in 16 bits"
        )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
