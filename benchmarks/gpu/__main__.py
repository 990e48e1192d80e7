"""`python -m benchmarks.gpu`: run stages, each job in a process of its own, with a time limit.

Each result goes to gpu.jsonl at once. So a stage that fails or hangs loses no earlier result.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.common import NO_CARD, ROOT, Options, reason


@dataclass(frozen=True)
class Stage:
    """A module of this package, whose `run(job, options)` does a job."""

    module: str
    seconds: float
    """Time limit of all its jobs together. Jobs that still run are then killed."""
    jobs: tuple[str, ...] = ("all",)
    at_once: int = 1
    """Number of jobs that run at the same time."""
    dry_jobs: tuple[str, ...] | None = None
    """The jobs of a dry run; None means all jobs."""
    interpreted: bool = True
    """A dry run interprets the kernels if True, else it compiles them for sm_90."""


DTYPES = ("bfloat16", "float16", "float32", "float64")
CONTESTANTS = ("ours", "ours, graph", "transformers, mamba_ssm", "transformers, drop-in")
MODELS = ("130m", "ys-24m")
STAGES = {
    "versions": Stage("versions", 90),
    "precompile": Stage("precompile", 75, ("checks",), interpreted=False),
    "precompile-sweep": Stage("precompile", 60, ("sweep",), interpreted=False),
    "check": Stage(
        "check",
        75,
        (*DTYPES, "model", "million", "layers"),
        7,
        dry_jobs=("bfloat16", "model", "million", "layers"),
    ),
    "sanitize": Stage("sanitize", 45, ("memcheck", "racecheck"), 2, dry_jobs=("memcheck",)),
    "sweep": Stage("sweep", 60),
    "precompile-layers": Stage("precompile", 45, ("layers",), interpreted=False),
    "sweep-layers": Stage("layers", 45),
    "time": Stage("measure", 50, ("fused", "eager", "first call"), dry_jobs=("fused", "eager")),
    "peers": Stage("peers", 120, ("compile", "scan", "mixer"), dry_jobs=("scan",)),
    "train": Stage(
        "train",
        150,
        tuple(f"{model}: {name}" for model in MODELS for name in CONTESTANTS),
        at_once=4,
        dry_jobs=("130m: ours", "130m: transformers, drop-in"),
    ),
    "breakdown": Stage(
        "breakdown",
        60,
        ("130m: ours", "130m: transformers, mamba_ssm", "130m: a token of batch 64"),
        at_once=3,
        dry_jobs=("130m: ours", "130m: a token of batch 64"),
    ),
    "decode": Stage("decode", 30, MODELS, 2, dry_jobs=MODELS[:1]),
    "ncu": Stage("ncu", 42),
    "quick": Stage("quick", 38, ("plain", "carried state", "no graphs"), 3, dry_jobs=("plain",)),
}
CALLS = {
    "a": ["versions", "precompile", "check", "sanitize"],
    "b": [
        "versions",
        "precompile-sweep",
        "sweep",
        "precompile-layers",
        "sweep-layers",
        "time",
        "peers",
        "train",
        "decode",
        "breakdown",
        "ncu",
        "quick",
    ],
    "all": list(STAGES),
}


def environment(stage: Stage, options: Options) -> dict[str, str]:
    """The environment of a job's process."""
    folders = ("", "kernels", "tests/kernels", "tests/gpu")
    paths = [str(ROOT / folder) for folder in folders]
    paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    cache = os.environ.get("TRITON_CACHE_DIR") or f"{tempfile.gettempdir()}/ysnake-gpu-cache"
    more = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": cache}
    more |= {
        "TRITON_CACHE_AUTOTUNING": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if options.dry:
        more |= {"TRITON_INTERPRET": "1" if stage.interpreted else "0", "CUDA_VISIBLE_DEVICES": ""}
        more |= {"OMP_WAIT_POLICY": "passive"}
    return os.environ | more


def run_stage(name: str, options: Options, limit: float) -> bool:
    """Run the jobs of a stage. Returns whether all succeeded. A failure is written as a row."""
    stage, began = STAGES[name], time.monotonic()
    waiting = list(stage.dry_jobs if options.dry and stage.dry_jobs else stage.jobs)
    waiting = [job for job in waiting if options.only in job]
    options.write(name, begins=time.strftime("%H:%M:%S"), jobs=len(waiting))
    deadline = began + min(stage.seconds * (5 if options.dry else 1), limit)
    running: dict[str, subprocess.Popen] = {}
    fine = True
    at_once = min(stage.at_once, 2) if options.dry else stage.at_once
    with open(options.out / "log.txt", "a") as log:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name, job]
                command += ["--out", str(options.out), "--processes", str(options.processes)]
                command += ["--peers", str(options.peers)] * bool(options.peers)
                command += ["--dry-run"] * options.dry
                process = {"stderr": log, "start_new_session": True, "cwd": ROOT}
                running[job] = subprocess.Popen(command, env=environment(stage, options), **process)
            time.sleep(0.05)
            late = time.monotonic() > deadline
            for job, process in list(running.items()):
                if late and process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    options.write(name, job=job, failed=f"stopped after {deadline - began:.0f} s")
                elif process.poll() is None:
                    continue
                elif process.returncode:
                    options.write(name, job=job, failed=f"exit code {process.returncode}")
                fine &= process.returncode == 0
                del running[job]
            if late and waiting:
                options.write(name, failed="no time left", jobs=waiting)
                waiting, fine = [], False
    options.write(name, took=round(time.monotonic() - began, 1), fine=fine)
    return fine


def work(name: str, job: str, options: Options) -> int:
    """Do a job in this process. Returns the exit code."""
    try:
        importlib.import_module(f"benchmarks.gpu.{STAGES[name].module}").run(job, options)
    except Exception as error:
        import traceback

        traceback.print_exc()
        options.write(name, job=job, failed=reason(error))
        return 1
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--call", choices=CALLS, help="a: checks, b: timings, all: both (default)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="run these stages instead")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this many seconds")
    parser.add_argument("--peers", type=Path, help="folder with mamba_ssm and causal_conv1d")
    parser.add_argument("--only", default="", help="only jobs whose name contains this text")
    parser.add_argument("--processes", type=int, default=16, help="how many compile at a time")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Run the stages. The exit code is 0 for success, 1 if something failed, 2 without a GPU."""
    args = parse()
    peers = args.peers and args.peers.resolve()
    options = Options(args.out.resolve(), args.dry_run, peers, args.processes, args.only)
    if args.worker:
        return work(*args.worker, options)
    if peers and not peers.is_dir():
        print(f"benchmarks.gpu: --peers: no such folder: {peers}", file=sys.stderr)
        return 2
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    fine = True
    for name in args.stage or CALLS[args.call or "all"]:
        left = args.seconds - (time.monotonic() - began)
        if left < 5:
            options.write(name, failed="no time left")
            fine = False
            continue
        fine &= run_stage(name, options, left)
        report.write(options.out)
        if any(NO_CARD in row.get("failed", "") for row in report.rows(options.out)[-3:]):
            print(f"benchmarks.gpu: {NO_CARD}; --dry-run needs none", file=sys.stderr)
            return 2
    print(report.summary(options.out))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
