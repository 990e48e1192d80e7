"""Stage `breakdown`: how much time each kernel of a training step and of a decoded token takes."""

from collections.abc import Callable

import torch

from benchmarks.gpu import decode, train
from benchmarks.gpu.common import Options, card_alone, synchronize

MOST = 45  # kernels that get a row of their own


def run(job: str, options: Options) -> None:
    model_name, _, name = job.partition(": ")
    size = "dry" if options.dry else model_name
    with card_alone():
        if name == "a token of batch 64":
            model, _ = train.ours(train.SIZES[size])
            model = model.to(options.device, torch.bfloat16).eval()
            work, _, _ = decode.step_of(model, 2 if options.dry else 64)
        else:
            model, loss_of = train.contestant(name, train.SIZES[size], options)
            batch, length = train.BATCHES[size][0]
            work = train.step_of(model, loss_of, batch, length, False, options)[0]
        write(job, work, options)


def write(job: str, work: Callable[[], object], options: Options) -> None:
    """Write a row for the sum of all kernels of a call, then one for each, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    work()
    work()
    synchronize(options.device)
    activity = ProfilerActivity.CPU if options.dry else ProfilerActivity.CUDA
    with profile(activities=[activity]) as found:
        work()
        synchronize(options.device)
    kernels = [e for e in found.key_averages() if time_of(e, options) > 0]
    kernels.sort(key=lambda e: -time_of(e, options))
    total = sum(time_of(e, options) for e in kernels)
    calls = sum(e.count for e in kernels)
    options.write("breakdown", job=job, kernel="all", calls=calls, ms=total)
    for e in kernels[:MOST]:
        ms = time_of(e, options)
        row = {"kernel": e.key[:150], "calls": e.count, "ms": ms, "share": ms / total}
        options.write("breakdown", job=job, **row)


def time_of(event, options: Options) -> float:
    """The time of a kernel in milliseconds."""
    spent = event.self_cpu_time_total if options.dry else event.self_device_time_total
    return spent / 1e3
