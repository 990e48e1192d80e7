"""Compile every kernel for each architecture, without a GPU: `python -m benchmarks.compile`.

It prints a table with the registers, spilled bytes, shared memory, instructions and compile time of
each kernel, and writes it to benchmarks/results/compile.md.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from unittest.mock import Mock, patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from ysnake_kernels.conv import fused as conv
from ysnake_kernels.layers_step import fused as layers_step
from ysnake_kernels.layers_step.inputs import LayersInputs
from ysnake_kernels.loss import fused as loss
from ysnake_kernels.norm import fused as norm
from ysnake_kernels.ssd import fused_backward, fused_forward
from ysnake_kernels.ssd.fused_plan import Constants
from ysnake_kernels.ssd.inputs import ScanInputs
from ysnake_kernels.step import fused as step
from ysnake_kernels.triton_launch import Launcher

from benchmarks.gpu import layers

RESULTS = Path(__file__).parent / "results" / "compile.md"
# architecture -> target, and the shared memory that one program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
HEADS = 24
MULTIPROCESSORS = 132  # a single sequence does not fill such a card, so it is cut into segments
PRODUCTION = [("bfloat16", 64, 128, False), ("bfloat16", 64, 64, False)]  # dtype, P, N, z
ALL = PRODUCTION + [
    (dtype, head, state, z)
    for dtype in ("bfloat16", "float16", "float32", "float64")
    for head, state, z in ((64, 128, True), (256, 256, False), (16, 16, True))
]


@dataclass
class Compiled:
    kernel: str
    target: str
    dtype: str
    head_dim: int
    state: int
    z: bool
    form: str
    registers: int | None  # None where the compiler does not say
    spilled: int | None  # bytes a thread
    shared: int
    limit: int
    warps: int
    loop: float | None  # warp-instructions per token and head in a scan's longest loop
    seconds: float


def recorded(call: Callable[[], object]) -> list[tuple]:
    """(kernel, args, options) of each launch of a call. Nothing is launched."""
    log: list[tuple] = []

    def record(self: Launcher, programs: tuple, tensors: Sequence, integers: Sequence) -> None:
        log.append((self.kernel, (*tensors, *integers, *self.constants), self.options))

    with patch.object(Launcher, "__call__", record):
        call()
    return log


def scan_launches(
    family: str, dtype: str, head_dim: int, state: int, z: bool, form: str = "plain"
) -> list[tuple]:
    """Launches of a scan of one sequence, forward and backward."""
    batch, length, packed = 1, 4096, 3 if form == "packed" else 1
    kwargs = {"dtype": getattr(torch, dtype), "device": "meta"}
    x = torch.empty(batch, length, HEADS, head_dim, **kwargs)
    dt = torch.empty(batch, length, HEADS, **kwargs)
    B = torch.empty(batch, length, 1, state, **kwargs)
    per_head = torch.empty(HEADS, device="meta")
    D, initial, seq_idx, cu_seqlens = per_head, None, None, None
    if form in ("documents", "packed"):
        D = torch.empty(HEADS, head_dim, device="meta")
        initial = torch.empty(packed, HEADS, head_dim, state, device="meta")
    if form == "documents":
        seq_idx = torch.empty(batch, length, dtype=torch.int32, device="meta")
    if form == "packed":
        cu_seqlens = torch.empty(packed + 1, dtype=torch.int32, device="meta")
    tensors = (x, dt, per_head, B, B, D, x if z else None, initial, per_head, seq_idx, cu_seqlens)
    inputs = ScanInputs(*tensors, dt_softplus=True)

    def call() -> None:
        fused_forward.forward(inputs)
        fused_backward.backward(x, initial, inputs)

    with ExitStack() as patches:
        for module in (fused_forward, fused_backward):
            stand_in = Mock(return_value=(family, MULTIPROCESSORS if form == "segments" else 1))
            patches.enter_context(patch.object(module, "family_and_processors", stand_in))
        return recorded(call)


def other_launches(dtype: str, head_dim: int, state: int) -> list[tuple]:
    """Launches of a layer's other operators on slices of one projection, then of a step."""
    d_inner = HEADS * head_dim
    channels = d_inner + 2 * state
    zxbcdt = torch.empty(2, 256, d_inner + channels + HEADS, dtype=getattr(torch, dtype))
    z, xBC, dt = zxbcdt.split([d_inner, channels, HEADS], -1)
    weight, bias, gain = torch.empty(channels, 4), torch.empty(channels), torch.empty(d_inner)
    x, B, C = xBC[:, 0].split([d_inner, state, state], -1)
    x, per_head = x.unflatten(-1, (HEADS, head_dim)), torch.empty(HEADS)
    S = torch.empty(2, HEADS, head_dim, state)

    def call() -> None:
        taps = (xBC.transpose(1, 2), weight, bias, None, None, True)
        y, _ = conv._forward(*taps)
        conv._backward(y, None, *taps)
        gated = (z.contiguous(), gain, None, z, 1e-5, d_inner, False)
        norm._backward(norm._forward(*gated, z.dtype), *gated)
        conv._step(xBC[:, 0], torch.empty(2, channels, 3), weight, bias, None, True)
        heads = (per_head, B[:, None], C[:, None], per_head, None, per_head, None)
        step._step(S, x, dt[:, 0], *heads, True, 0.0, float("inf"))
        loss.cross_entropy_(torch.empty(2, 50288, dtype=z.dtype), torch.zeros(2, dtype=torch.int64))
        if head_dim == 64:
            given = layers.stack(2, z.dtype, "cpu", layers=1, d_model=d_inner // 2, state=state)
            w = given.weights
            layers_step.step(LayersInputs(given.h, given.states, [w], w.norm_weight, w.eps))

    return recorded(call)


def compile_launch(kernel, args: tuple, kwargs: dict, target: GPUTarget):
    """The kernel as a launch with these arguments would compile it for this GPU."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def tool(name: str) -> Path:
    """A program for CUDA binaries. Triton's package contains some."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def longest_loop(assembly: str) -> int | None:
    """Instructions of the longest loop in the output of nvdisasm, None without a loop."""
    labels: dict[str, int] = {}
    count, longest = 0, None
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            count += 1
            jump = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels and count - labels[jump[1]] > 4:
                longest = max(longest or 0, count - labels[jump[1]])
    return longest


def instructions(compiled) -> int | None:
    """Instructions of one pass of a warp through the kernel's longest loop."""
    if "cubin" not in compiled.asm:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    return longest_loop(out.stdout)


def resources(compiled) -> tuple[int | None, int | None]:
    """Registers and spilled bytes of a thread, from the binary."""
    if "cubin" not in compiled.asm:
        llvm = compiled.asm["amdgcn"]
        counts = [
            re.search(rf"\.{name}:\s+(\d+)", llvm)
            for name in ("vgpr_count", "private_segment_fixed_size")
        ]
        return tuple(int(m[1]) if m else None for m in counts)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    return int(found[1]), int(found[2])


def compile_job(job: tuple) -> list[Compiled]:
    """The kernels of a layer of a shape, or of a scan in another form, for a target."""
    name, shape, form = job
    target, limit = TARGETS[name]
    log = scan_launches(name, *shape, form)
    if form == "plain" and not shape[3]:
        log += other_launches(*shape[:3])
    rows = []
    for kernel, args, kwargs in log:
        start = time.perf_counter()
        compiled = compile_launch(kernel, args, kwargs, target)
        seconds = time.perf_counter() - start
        operator = kernel.fn.__module__.split(".")[1]
        name_of = kernel.fn.__name__.removesuffix("_kernel").strip("_")
        label = operator if name_of == operator else f"{operator} {name_of}"
        usage = (*resources(compiled), compiled.metadata.shared)
        warps, loop = compiled.metadata.num_warps, None
        tile = next((c.Q.value for c in args if isinstance(c, Constants)), 0)
        if tile and (count := instructions(compiled)):
            loop = count * warps / tile
        rows.append(Compiled(label, name, *shape, form, *usage, limit, warps, loop, seconds))
    return rows


def compile_all(jobs: list[tuple], processes: int) -> list[Compiled]:
    """The rows of all jobs, in order. Triton's cache avoids compiling a kernel twice."""
    if processes == 1:
        return [row for job in jobs for row in compile_job(job)]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(compile_job, jobs) for row in rows]


def programs(r: Compiled) -> int | None:
    """How many programs a multiprocessor of an sm_80 or sm_90 card holds at once."""
    if r.target not in ("sm_80", "sm_90") or r.registers is None:
        return None
    registers = -(-r.registers * 32 // 256) * 256 * r.warps
    return min(65536 // registers, 64 // r.warps, r.limit // max(1, r.shared + 1024))


def table(rows: list[Compiled]) -> str:
    """A Markdown table, then the compile time of a first forward and backward of each shape."""
    lines = [
        "| kernel | target | dtype | head | state | z | form | registers | spilled bytes "
        "| shared memory | programs | instructions | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple, list[float]] = {}
    for r in rows:
        lines.append(
            f"| {r.kernel} | {r.target} | {r.dtype} | {r.head_dim} | {r.state} "
            f"| {'yes' if r.z else 'no'} | {r.form} | {r.registers} | {r.spilled} | {r.shared:,} "
            f"| {programs(r) or '-'} | {'-' if r.loop is None else round(r.loop)} "
            f"| {r.seconds:.1f} |"
        )
        if r.kernel.startswith("ssd") and r.form == "plain":
            key = (r.target, r.dtype, r.head_dim, r.state)
            first.setdefault(key, []).append(r.seconds)
    lines += ["", "First forward and backward of a scan in a new process, nothing cached:", ""]
    for (target, dtype, head, state), seconds in first.items():
        lines.append(
            f"- {target}, {dtype}, head {head}, state {state}: {len(seconds)} kernels, "
            f"{sum(seconds):.1f} s"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration of the table")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--states", nargs="+", type=int, help="only these state sizes")
    parser.add_argument("--processes", type=int, default=1, help="how many compile at a time")
    parser.add_argument("--json", type=Path, help="write a file of figures, not a table")
    args = parser.parse_args()
    shapes = [
        s for s in (ALL if args.all else PRODUCTION) if not args.states or s[2] in args.states
    ]
    jobs = [(name, shape, "plain") for name in args.targets for shape in shapes]
    if args.all:
        other = product(args.targets, PRODUCTION, ("segments", "documents", "packed"))
        jobs += [job for job in other if job[1] in shapes]
    if args.json:
        rows = compile_all(jobs, args.processes)
        args.json.write_text(json.dumps([asdict(r) | {"programs": programs(r)} for r in rows]))
        return
    with tempfile.TemporaryDirectory() as empty, patch.object(triton.knobs.cache, "dir", empty):
        text = table(compile_all(jobs, args.processes))
    about = (
        "Programs: how many a multiprocessor holds at once. Instructions: of all warps in the "
        "longest loop, per token and head."
    )
    text = f"# Compiled kernels, Triton {triton.__version__}\n\n{about}\n\n{text}"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
