"""Stage `time`: the time of every operator at every length, and of a first call."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import ysnake_kernels as ours

from benchmarks import traffic
from benchmarks.gpu import cases
from benchmarks.gpu.cases import BOTH, FORWARD, OPTIONS, TINY, arguments
from benchmarks.gpu.common import (
    Options,
    card_alone,
    copies,
    copy_bandwidth,
    multiprocessors,
    reason,
    seconds,
)
from benchmarks.traffic import Shape

TOKENS, LONG = 32768, 131072  # tokens of a call at every length, and of one long prompt


def run(job: str, options: Options) -> None:
    if job == "first call":
        return options.write("time", **first_call(options.dry))
    with card_alone():
        bandwidth = copy_bandwidth(options.device)
        if job == "fused":
            options.write("time", copy_bandwidth=bandwidth)
        for row in measurements(job, options):
            if job == "fused" and "seconds" in row:
                row["share"] = row["bytes"] / row["seconds"] / bandwidth
            options.write("time", **row)


def moved(op: str, mode: str, s: Shape, processors: int) -> float:
    """Bytes that our kernels read and write at least."""
    from ysnake_kernels.ssd import fused_backward, fused_plan
    from ysnake_kernels.triton_products import family_and_processors

    small = {name: sum(k.bytes for k in ks) for name, ks in traffic.others(s).items()}
    conv, conv_back, norm, norm_back, step = small.values()
    family, _ = family_and_processors(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    states, *halves = (
        fused_plan.TABLE[fused_plan.table_key(kind, 2, "usual", family)]
        for kind in ("states", "rows", "columns")
    )
    chunk = states.chunk
    tiles = s.batch * -(-s.length // chunk) * sum(chunk // half.tile for half in halves)
    tokens = s.batch * s.length
    forward, back = (
        fused_plan.segments(s.batch, directions * s.heads, 1, tokens, processors)
        for directions in (1, 2)
    )
    splits = fused_backward.splits_of_group(tiles * s.groups, s.heads // s.groups, processors)
    s = replace(s, chunk=chunk, segments=forward, back_segments=back, splits=splits)
    scan, scan_back = (sum(k.bytes for k in f(s)) for f in (traffic.forward, traffic.backward))
    forward = {"scan": scan, "convolution": conv, "norm": norm, "step": step}
    forward["mixer"] = conv + scan + norm
    back = {"scan": scan_back, "convolution": conv_back, "norm": norm_back}
    # the backward computes the forward again
    back["mixer"] = forward["mixer"] + conv_back + scan_back + norm_back
    return forward[op] + (back[op] if mode == BOTH else 0)


def measure(name: str, op: str, mode: str, s: Shape, options: Options) -> dict:
    """The seconds of a call, and the peak memory that it needs besides its arguments."""
    device = options.device
    bytes_of_one = traffic_of(op, s)
    sets = copies(bytes_of_one, device)
    calls = [
        cases.work(name, op, mode, arguments(s, torch.bfloat16, device, seed)[op])
        for seed in range(sets)
    ]
    if device == "cpu":
        return {"seconds": seconds(calls, device)}
    calls[0]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": seconds(calls, device), "peak": peak, "sets": sets}


def traffic_of(op: str, s: Shape) -> float:
    """Roughly the bytes of a call's tensors: its activations, or the states of a step."""
    if op == "step":
        return s.batch * s.heads * s.head_dim * s.state * 4
    return 2 * s.batch * s.length * s.heads * s.head_dim * s.item


def grid(name: str, dry: bool) -> Iterator[tuple[str, str, Shape]]:
    """Operators, modes and shapes. The most important ones come first."""
    base = replace(TINY if dry else Shape(), dt_item=2)
    lengths = [base.length] if dry else [4096, 512, 1024, 2048, 8192, 16384, 32768]
    if name == "eager":
        lengths = lengths[:1]
    shapes = [replace(base, batch=1 if dry else TOKENS // n, length=n) for n in lengths]
    if name == "fused" and not dry:
        shapes.append(replace(base, batch=1, length=LONG))
    for s in shapes:
        for op in OPTIONS:
            if op != "step" and not (dry and op in ("mixer", "convolution")):
                yield op, FORWARD, s
                yield op, BOTH, s
    for batch in [1] if dry else [1, 16, 64, 256]:
        yield "step", FORWARD, replace(base, batch=batch, length=1)


def measurements(name: str, options: Options) -> Iterator[dict]:
    """The rows of one implementation. A failure is a row too."""
    processors = multiprocessors(options.device)
    for op, mode, s in grid(name, options.dry):
        row = {"operator": op, "mode": mode, "by": name, "batch": s.batch, "length": s.length}
        try:
            row["bytes"] = moved(op, mode, s, processors)
            yield row | measure(name, op, mode, s, options)
        except Exception as error:  # the others go on
            yield row | {"failed": reason(error)}


def first_call(dry: bool) -> dict:
    """Seconds of the first forward and backward in a new process that has to compile the kernels,
    and in another one that finds them compiled. Also the number of kernels."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", "from benchmarks.gpu.measure import time_first_call"]
        command[-1] += f"; print(time_first_call({dry}))"
        spent = []
        for _ in range(1 if dry else 2):
            run = {"capture_output": True, "text": True, "timeout": 60, "env": environment}
            done = subprocess.run(command, **run)
            if done.returncode:
                return {"first call": done.stderr.strip().splitlines()[-1][:200]}
            spent.append(float(done.stdout.split()[-1]))
        kernels = sum(len(list(Path(cache).rglob(f"*.{end}"))) for end in ("cubin", "hsaco"))
    return {"first call": "fused", "empty": spent[0], "filled": spent[-1], "kernels": kernels}


def time_first_call(dry: bool) -> float:
    """The seconds of a first forward and backward in this process."""
    s, device = (TINY, "cpu") if dry else (Shape(batch=1, length=2048), "cuda")
    leaves = arguments(s, torch.bfloat16, device)["scan"]
    leaves = {k: t.detach().requires_grad_() for k, t in leaves.items()}
    with ours.backend("fused"):
        start = time.perf_counter()
        y = ours.ssd_scan(**leaves, **OPTIONS["scan"])
        torch.autograd.grad(y, list(leaves.values()), y)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start
