"""Products in 16 bits: whether this machine's CPU has them, and their use."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # torch's names, of x86 and Arm
LEAST_GAIN = 1.2  # 16-bit products have to be this many times as fast
MEASURED = (1024, 512, 1024)  # rows, inputs and outputs of the product that is timed
TIMES = 5


def bfloat16_products() -> list[str]:
    """Names of the CPU's instructions that multiply bfloat16 numbers and that torch knows."""
    import torch

    known = torch.cpu.get_capabilities()
    return [name for name in BFLOAT16 if known.get(name)]


class _Rounding:
    """A setting of torch that holds while any thread wants it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0  # that want it now
        self.before = ""  # what the setting was before the first of them

    def begin(self) -> None:
        with self.lock:
            self.blocks += 1
            if self.blocks == 1:
                self.before = _of_products().fp32_precision
                _of_products().fp32_precision = "bf16"

    def end(self) -> None:
        with self.lock:
            self.blocks -= 1
            if self.blocks == 0:
                _of_products().fp32_precision = self.before


def _of_products() -> Any:
    """torch's settings for matrix products by oneDNN, which computes them where 16 bits help."""
    import torch

    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


_rounding = _Rounding()


@contextmanager
def rounded_products() -> Iterator[None]:
    """While the block runs, a CPU rounds the factors of float32 products to bfloat16.

    CPUs without such products do not round. Tensors stay float32, and so do the sums of the
    products. That is more exact than autocast and, on a CPU, faster. It is a setting of torch for
    the whole process. When the last thread leaves such a block, it is restored.
    """
    _rounding.begin()
    try:
        yield
    finally:
        _rounding.end()


def gain_of_16_bits() -> float:
    """How many times as fast products are here when their factors are rounded to bfloat16."""
    import torch

    rows, inputs, outputs = MEASURED
    x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)

    def seconds(setting: AbstractContextManager[object]) -> float:
        with setting:
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            return max(time.perf_counter() - start, 1e-9)

    times = [(seconds(nullcontext()), seconds(rounded_products())) for _ in range(TIMES)]
    exact, rounded = (min(each) for each in zip(*times, strict=True))
    return exact / rounded


@cache
def rounding_is_faster() -> bool:
    """Whether this CPU has 16-bit products and they are clearly faster, by a short measurement."""
    return bool(bfloat16_products()) and gain_of_16_bits() >= LEAST_GAIN
