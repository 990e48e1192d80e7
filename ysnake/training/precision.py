"""Matrix products in 16 bits, as `--precision` asks.

State, decays, sums, norms, the residual stream and the optimizer stay in float32 everywhere.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ysnake.shared.processor import bfloat16_products

if TYPE_CHECKING:
    import torch
    from rich.console import Console


def autocast(precision: str, device: "torch.device") -> "AbstractContextManager[object]":
    """A context in which products are in bfloat16, on a GPU. On a CPU see `rounded_products`."""
    import torch

    chosen = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    if not chosen or device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def rounded_products(precision: str, device: "torch.device", console: "Console") -> Iterator[None]:
    """While the block runs, a CPU rounds the factors of its products to bfloat16, if asked to.

    Tensors stay float32, and so do the sums of the products. So this costs no conversion of whole
    tensors, which makes it faster than autocast on a CPU. It is a setting of torch for the whole
    process. The block restores it at its end.
    """
    import torch

    if precision != "bfloat16" or device.type != "cpu":
        yield
        return
    if not bfloat16_products():
        console.print(
            "warning: --precision bfloat16: this CPU has no products in 16 bits, so training uses "
            "float32"
        )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
