"""What Triton makes of the fused scan for each architecture, without a GPU.

Registers, spilled bytes, shared memory and compile time of each kernel: `python -m
benchmarks.compile` prints the table and writes it to benchmarks/results/compile.md.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from ysnake_kernels.ssd import fused_backward, fused_forward
from ysnake_kernels.ssd.fused_tiles import Device

RESULTS = Path(__file__).parent / "results" / "compile.md"
# architecture -> target, and the shared memory that one program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
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
    registers: int | None  # None where the compiler does not say
    spilled: int | None  # bytes a thread
    shared: int
    limit: int
    seconds: float


class _Recorder:
    """Stands for a kernel: remembers the launches."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches(
    family: str, dtype: str, head_dim: int, state: int, z: bool, multiprocessors: int = 1
) -> list[tuple]:
    """(kernel, args, kwargs) of all launches of a forward and a backward, without running them."""
    log: list[tuple] = []
    names = {
        fused_forward: ("states_kernel", "forward_kernel"),
        fused_backward: ("states_kernel", "gradients_kernel", "steps_kernel"),
    }
    patches = [
        patch.object(module, "device", lambda x: Device(family, multiprocessors))
        for module in names
    ] + [
        patch.object(module, name, _Recorder(getattr(module, name), log))
        for module, its in names.items()
        for name in its
    ]
    batch, length, heads = 1, 4096, 24
    kwargs = {"dtype": getattr(torch, dtype), "device": "meta"}
    x = torch.empty(batch, length, heads, head_dim, **kwargs)
    dt = torch.empty(batch, length, heads, **kwargs)
    B = torch.empty(batch, length, 1, state, **kwargs)
    per_head = torch.empty(heads, dtype=torch.float32, device="meta")
    gate = x if z else None
    arguments = (x, dt, per_head, B, B, per_head, gate, None, per_head, None, None)
    options = (True, 0.0, float("inf"))
    for p in patches:
        p.start()
    try:
        fused_forward.forward(*arguments, *options)
        fused_backward.backward(x, None, *arguments, *options)
    finally:
        for p in patches:
            p.stop()
    return log


def compile_launch(kernel, args: tuple, kwargs: dict, target: GPUTarget):
    """What a launch with these arguments would compile on a machine with this GPU."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(compiled) -> tuple[int | None, int | None]:
    """Registers and spilled bytes of a thread, from the binary."""
    if "cubin" not in compiled.asm:
        llvm = compiled.asm["amdgcn"]
        counts = [
            re.search(rf"\.{name}:\s+(\d+)", llvm)
            for name in ("vgpr_count", "private_segment_fixed_size")
        ]
        return tuple(int(m[1]) if m else None for m in counts)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    return int(found[1]), int(found[2])


def compile_all(shapes: list[tuple], targets: list[str], multiprocessors: int = 1):
    """Yield a `Compiled` for each kernel, shape and target."""
    for name in targets:
        target, limit = TARGETS[name]
        for shape in shapes:
            for kernel, args, kwargs in launches(name, *shape, multiprocessors):
                start = time.perf_counter()
                compiled = compile_launch(kernel, args, kwargs, target)
                seconds = time.perf_counter() - start
                registers, spilled = resources(compiled)
                shared = compiled.metadata.shared
                yield Compiled(
                    kernel.fn.__name__, name, *shape, registers, spilled, shared, limit, seconds
                )


def table(rows: list[Compiled]) -> str:
    """A Markdown table, and the compile time of each first forward and backward."""
    lines = [
        "| kernel | target | dtype | head | state | z | registers | spilled bytes | shared memory "
        "| compile s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    totals: dict[tuple, float] = {}
    for r in rows:
        lines.append(
            f"| {r.kernel} | {r.target} | {r.dtype} | {r.head_dim} | {r.state} "
            f"| {'yes' if r.z else 'no'} | {r.registers} | {r.spilled} | {r.shared:,} "
            f"| {r.seconds:.1f} |"
        )
        key = (r.target, r.dtype, r.head_dim, r.state)
        totals[key] = totals.get(key, 0.0) + r.seconds
    lines += ["", "First forward and backward of a process, compile seconds:", ""]
    for (target, dtype, head, state), seconds in totals.items():
        lines.append(f"- {target}, {dtype}, head {head}, state {state}: {seconds:.1f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration of the table")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--states", nargs="+", type=int, help="only these state sizes")
    parser.add_argument("--json", type=Path, help="write the figures here, and no table")
    args = parser.parse_args()
    shapes = [
        s for s in (ALL if args.all else PRODUCTION) if not args.states or s[2] in args.states
    ]
    rows = list(compile_all(shapes, args.targets))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows]))
    else:
        text = f"# Compiled kernels of the scan, Triton {triton.__version__}\n\n" + table(rows)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)
        print(text)


if __name__ == "__main__":
    main()
