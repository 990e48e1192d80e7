"""The fused operators on this machine's GPU: whether they are right, how fast, and how near to the
memory's own speed.

    PYTHONPATH=kernels python -m benchmarks.gpu --out DIR

Needs torch, triton and einops, nothing installed besides; writes gpu.json, gpu.md and, where
matplotlib can be imported, two pictures. Bandwidths are the bytes that benchmarks.traffic counts
over the time measured, so what a kernel reads twice by mistake shows as a lower one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import ysnake_kernels as ours

from benchmarks import gpu_report, traffic
from benchmarks.gpu_cases import OPTIONS, ROOT, TINY, arguments, checks, operators
from benchmarks.traffic import Shape

FORWARD, BOTH = "forward", "forward + backward"
TOKENS, LONG = 32768, 131072  # of a call at every length, and of the single long prompt


def seconds(call: Callable[[], object], device: str) -> float:
    """The median time of a call by CUDA events, with nothing of it left in the cache before; on a
    CPU the wall-clock time of one."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    for _ in range(2):
        call()
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = min(50, max(5, int(0.3 / (time.perf_counter() - start))))
    cache = torch.empty(512 * 2**20, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        cache.zero_()  # takes longer than the launches that the host queues meanwhile
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a plain copy."""
    source = torch.zeros(2**20 if device == "cpu" else 2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def moved(op: str, mode: str, s: Shape, multiprocessors: int) -> float:
    """Bytes that our kernels must read and write."""
    from ysnake_kernels.ssd import fused_backward, fused_tiles

    small = {name: sum(k.bytes for k in ks) for name, ks in traffic.others(s).items()}
    conv, conv_back, norm, norm_back, step = small.values()
    main = fused_tiles.TABLE["gradients", 2, "usual"]
    tiles = s.batch * -(-s.length // main.chunk) * (main.chunk // main.tile)
    tokens = s.batch * s.length
    forward, back = (
        fused_tiles.segments(s.batch, directions * s.heads, 1, tokens, multiprocessors)
        for directions in (1, 2)
    )
    splits = fused_backward.splits_of_group(
        2 * tiles * s.groups, s.heads // s.groups, multiprocessors
    )
    s = replace(s, segments=forward, back_segments=back, splits=splits)
    scan, scan_back = (sum(k.bytes for k in f(s)) for f in (traffic.forward, traffic.backward))
    forward = {"scan": scan, "convolution": conv, "norm": norm, "step": step}
    forward["mixer"] = conv + scan + norm
    back = {"scan": scan_back, "convolution": conv_back, "norm": norm_back}
    back["mixer"] = forward["mixer"] + conv_back + scan_back + norm_back  # computes it again
    return forward[op] + (back[op] if mode == BOTH else 0)


def measure(name: str, op: str, mode: str, tensors: dict, device: str) -> tuple[float, int | None]:
    """Seconds of a call, and the most bytes that it needs besides its arguments."""
    operator = partial(operators(name)[op], **OPTIONS[op])
    leaves = {k: t.detach().requires_grad_(mode == BOTH) for k, t in tensors.items()}

    def call() -> None:
        y = operator(**leaves)
        if mode == BOTH:
            torch.autograd.grad(y, list(leaves.values()), dy)

    context = ours.backend(name) if name != "mamba_ssm" else torch.enable_grad()
    with context:
        if mode == BOTH:
            dy = torch.randn_like(operator(**leaves))
        if device == "cpu":
            return seconds(call, device), None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        return seconds(call, device), peak


def measurements(names: list[str], device: str, dry: bool, deadline: float) -> Iterator[dict]:
    """Every operator at every length by each implementation, ours first; what fails says why."""
    lengths = [TINY.length] if dry else [512 * 2**k for k in range(6)]
    base = replace(TINY if dry else Shape(), dt_item=2)
    shapes = [replace(base, batch=1 if dry else TOKENS // n, length=n) for n in lengths]
    shapes += [] if dry else [replace(base, batch=1, length=LONG)]
    steps = [replace(base, batch=b, length=1) for b in ([1] if dry else [1, 16, 64, 256])]
    modes = [(op, m) for op in OPTIONS if op != "step" for m in (FORWARD, BOTH)]
    multiprocessors = 1
    if device != "cpu":
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for name in names:
        for s in shapes + steps:
            given = arguments(s, torch.bfloat16, device)
            for op, mode in [("step", FORWARD)] if s in steps else modes:
                row = {"operator": op, "mode": mode, "by": name}
                row |= {"batch": s.batch, "length": s.length}
                row["bytes"] = moved(op, mode, s, multiprocessors)
                try:
                    if time.monotonic() > deadline:
                        raise TimeoutError("no time left")
                    row["seconds"], row["peak"] = measure(name, op, mode, given[op], device)
                except Exception as error:  # one that does not run hides none of the others
                    row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                yield row


def first_call(name: str, dry: bool) -> dict:
    """Seconds of the first forward and backward of a new process without compiled kernels, then of
    another that finds them; how many kernels were compiled."""
    with tempfile.TemporaryDirectory() as cache:
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        more = {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "benchmarks.gpu", "--first-call", name]
        command += ["--dry-run"] * dry
        spent = []
        for _ in range(1 if dry else 2):
            options = {"capture_output": True, "text": True, "timeout": 60}
            try:
                done = subprocess.run(command, env=os.environ | more, **options)
            except subprocess.TimeoutExpired:
                return {"by": name, "failed": "more than 60"}
            if done.returncode:
                return {"by": name, "failed": done.stderr.strip().splitlines()[-1][:200]}
            spent.append(float(done.stdout.split()[-1]))
        kernels = sum(len(list(Path(cache).rglob(f"*.{end}"))) for end in ("cubin", "hsaco"))
        return {"by": name, "empty": spent[0], "filled": spent[-1], "kernels": kernels}


def time_first_call(name: str, device: str, dry: bool) -> float:
    """What the new process does."""
    s = TINY if dry else Shape(batch=1, length=2048)
    leaves = arguments(s, torch.bfloat16, device)["scan"]
    leaves = {k: t.detach().requires_grad_() for k, t in leaves.items()}
    operator = operators(name)["scan"]
    with ours.backend("fused"):
        start = time.perf_counter()
        y = operator(**leaves, **OPTIONS["scan"])
        torch.autograd.grad(y, list(leaves.values()), y)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> int:
    """Measure as the command line says; 0, 1 if an operator is wrong, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="where the results go")
    parser.add_argument("--minutes", type=float, default=7, help="start no measurement later")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: does it run?")
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    began, dry, device = time.monotonic(), args.dry_run, "cpu" if args.dry_run else "cuda"
    if dry and os.environ.get("TRITON_INTERPRET") != "1":  # torch has read it already
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    if not dry and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; --dry-run needs none", file=sys.stderr)
        return 2
    if args.first_call:
        print(time_first_call(args.first_call, device, dry))
        return 0
    import triton

    names = ["fused", "eager"]
    if not dry and find_spec("mamba_ssm") and find_spec("causal_conv1d"):
        names.insert(1, "mamba_ssm")
    s = TINY if dry else Shape()
    shape = f"{s.heads} heads of size {s.head_dim}, state {s.state}, {s.groups} group"
    card = "CPU, a dry run" if dry else torch.cuda.get_device_name()
    result = {"card": card, "torch": torch.__version__, "triton": triton.__version__}
    result |= {"shape": shape, "copy_bandwidth": copy_bandwidth(device), "checks": [], "times": []}
    result["first_call"] = [first_call(name, dry) for name in names if name != "eager"]
    args.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        result["took"] = time.monotonic() - began
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1))
        (args.out / "gpu.md").write_text(gpu_report.markdown(result, names))

    for row in checks(device, dry):
        result["checks"].append(row)
    save()  # lest one that hangs later take the rest with it
    for row in measurements(names, device, dry, began + 60 * args.minutes):
        if row["by"] == "fused" and "seconds" in row:
            row["bandwidth"] = row["bytes"] / row["seconds"]
            row["share"] = row["bandwidth"] / result["copy_bandwidth"]
        result["times"].append(row)
        save()
    print((args.out / "gpu.md").read_text())
    if find_spec("matplotlib"):
        gpu_report.pictures(result, names, args.out)
    else:
        print("matplotlib cannot be imported: the pictures are left out")
    return 0 if all(c["right"] for c in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
