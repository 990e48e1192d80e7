"""Launch each of our kernels once, for the sanitizer and the profiler.

`python -m benchmarks.gpu.small SHAPE`: `tiny` is for the sanitizer, `large` for the profiler, `dry`
for a CPU. `large` runs twice, and the profiler records only the second time, with all compiled.
"""

import sys
from dataclasses import replace

import torch
import ysnake_kernels as ours

from benchmarks.gpu import layers
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
    # tensors are made on the CPU for the sanitizer, so that it sees only our kernels
    place = "cpu" if name == "tiny" else device
    calls = []
    for op in ("norm",) if name == "dry" else ("scan", "convolution", "norm"):
        tensors = arguments(s, torch.bfloat16, place)[op]
        calls.append(work("fused", op, BOTH, {k: t.to(device) for k, t in tensors.items()}))
    step = {k: t.to(device) for k, t in arguments(one, torch.bfloat16, place)["step"].items()}
    calls.append(work("fused", "step", FORWARD, step))
    x, weight, bias = (
        t.to(device) for t in arguments(one, torch.bfloat16, place)["convolution"].values()
    )
    state = torch.zeros(*x.shape[:2], 4, dtype=x.dtype).to(device)
    calls.append(lambda: ours.causal_conv1d_step(x[..., 0], state, weight, bias, "silu"))
    logits = torch.randn(s.length, 5000).to(device, torch.bfloat16)  # more than a block of tokens
    targets = torch.zeros(s.length, dtype=torch.int64).to(device)
    calls.append(lambda: ours.cross_entropy_(logits, targets))
    batch, sizes = 64 if name == "large" else 3, layers.TINY if name == "dry" else {}
    calls.append(layers.stack(batch, torch.bfloat16, device, **sizes).step)
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
