"""The benchmark for a GPU runs, at tiny shapes on the CPU, with nothing installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")} | environment
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_dry_run(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {c["dtype"] for c in result["checks"]} == {"bfloat16", "float16", "float32"}
    assert all(c["right"] for c in result["checks"])
    assert not [row for row in result["times"] if "failed" in row]
    operators = {row["operator"] for row in result["times"]}
    assert operators == {"scan", "convolution", "norm", "step", "mixer"}
    assert "failed" not in result["first_call"][0]
    assert "forward + backward" in (tmp_path / "gpu.md").read_text()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == ({"times.png", "bandwidth.png"} if find_spec("matplotlib") else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
