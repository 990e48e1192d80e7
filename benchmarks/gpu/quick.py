"""Stage `quick`: `ysnake.train --preset quick` for 200 steps, plain, with carried state, without
CUDA graphs."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.common import Options


def run(job: str, options: Options) -> None:
    steps = 2 if options.dry else 200
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "ysnake.train", "--preset", "quick", "--run", str(run)]
        command += ["--max-steps", str(steps), "--eval-every", "100"]
        command += ["--carry-state"] * (job == "carried state")
        command += ["--no-graphs"] * (job == "no graphs")
        if options.dry:
            command += ["--device", "cpu", "--max-documents", "4", "--d-model", "32"]
            command += ["--n-layers", "1", "--seq-len", "16", "--batch-size", "2"]
        start = time.monotonic()
        limit = 180 if options.dry else 36
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        row = {"case": job, "code": done.returncode, "seconds": time.monotonic() - start}
        metrics = run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        options.write("quick", **row, first=lines[:1], last=lines[-1:])
        if done.returncode:
            raise SystemExit(1)
