"""One launch of each of our kernels: what the sanitizer and the profiler look at.

`python -m benchmarks.gpu.small SHAPE`: `tiny` for the sanitizer, `large` for the profiler, `dry`
for a CPU. With `large` the profiler records the second time only, when all is compiled.
"""

import sys
from dataclasses import replace

import torch

from benchmarks.gpu.cases import BOTH, FORWARD, TINY, arguments, work
from benchmarks.traffic import Shape

SHAPES = {
    "dry": replace(TINY, groups=2),
    "tiny": Shape(batch=1, length=150, heads=2, head_dim=64, state=128),
    "large": Shape(),
}


def main(name: str) -> None:
    s, device = SHAPES[name], "cpu" if name == "dry" else "cuda"
    one = replace(s, batch=64 if name == "large" else 2, length=1)
    place = "cpu" if name == "tiny" else device  # made there: the sanitizer sees no other kernels
    calls = []
    for op in ("norm",) if name == "dry" else ("scan", "convolution", "norm"):
        tensors = arguments(s, torch.bfloat16, place)[op]
        calls.append(work("fused", op, BOTH, {k: t.to(device) for k, t in tensors.items()}))
    step = {k: t.to(device) for k, t in arguments(one, torch.bfloat16, place)["step"].items()}
    calls.append(work("fused", "step", FORWARD, step))
    for call in calls:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    if name == "large":
        torch.cuda.profiler.start()
        for call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
