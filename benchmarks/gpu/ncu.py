"""Stage `ncu`: Nsight Compute's figures of one launch of each kernel, as CSV in ncu.csv."""

import subprocess
import sys

from benchmarks.gpu.common import Options
from benchmarks.gpu.sanitize import found

SECONDS = 40
SECTIONS = (
    *("LaunchStats", "Occupancy", "SpeedOfLight", "WarpStateStats", "SchedulerStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "InstructionStats"),
)


def run(job: str, options: Options) -> None:
    script = [sys.executable, "-m", "benchmarks.gpu.small", "dry" if options.dry else "large"]
    file = options.out / "ncu.csv"
    command = []
    if not options.dry:
        command = [found("ncu"), "--clock-control", "none", "--profile-from-start", "off"]
        command += [word for name in SECTIONS for word in ("--section", name)]
        command += ["--launch-count", "50", "--page", "details", "--csv", "--print-units", "base"]
        command += ["--log-file", str(file)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*command, *script], timeout=SECONDS, check=False, **output)
    print(done.stdout[-4000:], file=sys.stderr)
    size = file.stat().st_size if file.exists() else 0
    options.write("ncu", code=done.returncode, file=file.name, bytes=size)
    if done.returncode or not (size or options.dry):
        raise SystemExit(1)
