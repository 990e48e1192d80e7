"""The fused scan compiles for every architecture on a machine without a GPU: shared memory fits,
registers suffice. In a process of its own: the interpreter of the other tests cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# bytes a thread that the launch table accepts, and says why: (kernel, state size) -> at most
ACCEPTED = {("gradients_kernel", 128): 32}


def compiled(tmp_path, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    out = tmp_path / "compiled.json"
    command = [sys.executable, "-m", "benchmarks.compile", "--json", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def check(rows):
    for row in rows:
        assert row["shared"] <= row["limit"], row
        bare = row["dtype"] == "bfloat16" and row["head_dim"] == 64 and not row["z"]
        if bare and row["target"] in ("sm_80", "sm_90"):
            assert row["spilled"] <= ACCEPTED.get((row["kernel"], row["state"]), 0), row


@pytest.mark.parametrize(
    ("state", "targets"),
    [("128", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]), ("64", ["sm_80", "sm_90"])],
)
def test_production_shapes(tmp_path, state, targets):
    rows = compiled(tmp_path, "--states", state, "--targets", *targets)
    assert len({row["kernel"] for row in rows}) == 4
    assert len(rows) == 4 * len(targets)  # a first forward and backward compile four kernels
    check(rows)


@pytest.mark.slow
def test_every_configuration(tmp_path):
    check(compiled(tmp_path, "--all"))
