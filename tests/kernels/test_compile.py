"""The fused kernels compile for every architecture on a machine without a GPU: shared memory fits,
registers suffice. In a process of its own: the interpreter of the other tests cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[2]
SCAN = ("decays", "forward", "decays", "states", "rows", "columns", "steps")
FIRST = [f"ssd {name}" for name in SCAN]
REST = [
    "conv forward",
    "conv backward",
    "norm forward",
    "norm backward",
    "conv step",
    "step",
    "loss",
    "layers_step join",
    "layers_step mix",
    "layers_step join",
]
# bytes that a thread may spill: two programs then fit on a multiprocessor, which was faster
ACCEPTED = {"ssd rows": 400, "ssd columns": 500}


def compiled(tmp_path, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    out = tmp_path / "compiled.json"
    command = [sys.executable, "-m", "benchmarks.compile", "--json", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def check(rows):
    for row in rows:
        assert row["shared"] <= row["limit"], row
        usual = row["dtype"] == "bfloat16" and row["head_dim"] == 64 and not row["z"]
        if usual and row["form"] == "plain" and row["target"] in ("sm_80", "sm_90"):
            assert row["spilled"] <= ACCEPTED.get(row["kernel"], 0), row
            if row["target"] == "sm_90" and row["kernel"] in ("ssd forward", "ssd states"):
                assert row["programs"] >= 2, row


@pytest.mark.parametrize(
    ("state", "targets"),
    [
        ("128", ["sm_90"]),
        pytest.param("128", ["sm_80", "sm_100", "sm_120", "gfx942"], marks=pytest.mark.slow),
        pytest.param("64", ["sm_80", "sm_90"], marks=pytest.mark.slow),
    ],
)
def test_production_shapes(tmp_path, state, targets):
    rows = compiled(tmp_path, "--states", state, "--targets", *targets)
    assert [row["kernel"] for row in rows] == (FIRST + REST) * len(targets)
    check(rows)


@pytest.mark.slow
def test_every_configuration(tmp_path):
    check(compiled(tmp_path, "--all", "--processes", "2"))
