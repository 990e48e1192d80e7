"""How long the host takes to launch an operator: `python -m benchmarks.host_time`.

Tensors are tiny, and a stand-in for the CUDA driver accepts the launches and does nothing. So what
is measured is the time of Python, torch and Triton between the kernels, for which a GPU waits. The
mixer has no output projection here. This needs Linux on x86-64 and a C compiler, but no GPU.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases import OPTIONS, arguments, operators
from benchmarks.gpu.common import ROOT
from benchmarks.traffic import Shape

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
TINY = Shape(batch=1, length=32, heads=4, head_dim=16, state=16)


def measured(call: Callable[[], object], launches: Callable[[], int], repeats: int) -> str:
    """Median and least processor time of a call, and its launches, once all is compiled."""
    times = []
    for i in range(repeats + 5):  # the first calls compile and fill caches
        before, start = launches(), time.thread_time()  # the time of other threads does not count
        call()
        if i >= 5:
            times.append((time.thread_time() - start) * 1e6)
    return f"{statistics.median(times):8.0f} {min(times):8.0f} {launches() - before:8d}"


def both_ways(operator: Callable, inputs: dict[str, Tensor]) -> dict[str, Callable]:
    """Calls of an operator forward and backward."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = operator(**leaves)
    dy, wanted = torch.zeros_like(y), list(leaves.values())

    def forward_and_backward() -> None:
        torch.autograd.grad(operator(**leaves), wanted, dy)

    return {
        "forward": partial(operator, **leaves),
        "forward and backward": forward_and_backward,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    import stand_in_driver

    if missing := stand_in_driver.missing():
        print(f"host_time: {missing}", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    given = arguments(TINY, torch.bfloat16, "cpu")
    print(f"{'microseconds':32s} {'median':>8s} {'fastest':>8s} {'launches':>8s}")
    with stand_in_driver.gpu() as launches:
        for name, inputs in given.items():
            operator = partial(operators("fused")[name], **OPTIONS[name])
            if name == "step":
                calls = {"": torch.no_grad()(partial(operator, **inputs))}
            else:
                calls = both_ways(operator, inputs)
            for way, call in calls.items():
                print(f"{name + ' ' + way:32s} {measured(call, launches, repeats)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
