"""Stage `sanitize`: compute-sanitizer looks for bad memory accesses and races in every kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.common import Options

SECONDS = 40  # time limit of each tool
TOOLS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}


def found(name: str) -> str:
    """The path of one of CUDA's tools, also where it is not on the PATH."""
    path = shutil.which(name) or f"/usr/local/cuda/bin/{name}"
    if not Path(path).exists():
        raise FileNotFoundError(f"{name}: not on the PATH and not in /usr/local/cuda/bin")
    return path


def run(job: str, options: Options) -> None:
    script = [sys.executable, "-m", "benchmarks.gpu.small", "dry" if options.dry else "tiny"]
    command = []
    if not options.dry:
        command = [found("compute-sanitizer"), "--tool", job, "--print-limit", "20"]
        command += ["--error-exitcode", "9", "--launch-timeout", "30"]
        command += ["--target-processes", "application-only"]  # not the processes that compile
    environment = os.environ | TOOLS[job]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(
        [*command, *script], env=environment, timeout=SECONDS, check=False, **output
    )
    print(done.stdout[-6000:], file=sys.stderr)
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line or line == "done"]
    right = done.returncode == 0 and "done" in summary
    options.write("sanitize", case=job, code=done.returncode, said=summary, right=right)
    if not right:
        raise SystemExit(1)
