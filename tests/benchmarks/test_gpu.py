"""The benchmark for a GPU: its stages run on the CPU with tiny shapes. Failures lose no results."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import ysnake_kernels as ours

pytest.importorskip("triton", reason="Triton is for Linux")

from benchmarks.gpu import cases, report, sweep
from benchmarks.gpu.__main__ import CALLS, STAGES, run_stage
from benchmarks.gpu.common import Options

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_dry_run_of_two_stages(tmp_path):
    done = run("--dry-run", "--stage", "versions", "decode", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    found = report.rows(tmp_path)
    assert [row["stage"] for row in found if "took" in row] == ["versions", "decode"]
    decoded = [row for row in found if "tokens per second" in row]
    assert decoded
    assert all(row["tokens per second"] > 0 for row in decoded)
    assert "## decode" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["a", "b"])
def test_dry_run_of_a_call(tmp_path, call):
    done = run("--dry-run", "--call", call, "--out", tmp_path)
    failed = [row for row in report.rows(tmp_path) if "failed" in row]
    without_peers = [row for row in failed if row["stage"] != "peers"]
    assert not without_peers, (tmp_path / "log.txt").read_text()[-3000:]
    finished = [row["stage"] for row in report.rows(tmp_path) if "took" in row]
    assert finished == CALLS[call], done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = run("--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_says_that_there_is_no_folder_of_peers(tmp_path):
    done = run("--peers", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"benchmarks.gpu: --peers: no such folder: {tmp_path / 'none'}"
    ]
    assert not (tmp_path / "out").exists()


def test_a_stage_that_takes_too_long_is_stopped_and_says_so(tmp_path):
    assert not run_stage("check", Options(tmp_path, dry=True), 0.2)
    failed = [row["failed"] for row in report.rows(tmp_path) if "failed" in row]
    assert any("stopped" in line for line in failed)
    assert any("no time left" in line for line in failed)


def test_after_a_failed_job_the_others_run(tmp_path, monkeypatch):
    jobs = ("no such tool", "nor this")
    monkeypatch.setitem(STAGES, "sanitize", replace(STAGES["sanitize"], jobs=jobs, dry_jobs=jobs))
    assert not run_stage("sanitize", Options(tmp_path, dry=True), 60)
    found = report.rows(tmp_path)
    errors = {row["job"]: row["failed"] for row in found if "KeyError" in row.get("failed", "")}
    assert set(errors) == set(jobs)
    assert "took" in found[-1]


def test_an_incomplete_line_of_results_is_skipped(tmp_path):
    lines = [json.dumps({"stage": "time", "seconds": 1.5}), '{"stage": "time", "sec']
    (tmp_path / "gpu.jsonl").write_text("\n".join(lines))
    assert report.rows(tmp_path) == [{"stage": "time", "seconds": 1.5}]


@pytest.mark.parametrize("name", cases.names(dry=False))
def test_cases_are_calls_that_the_operators_take(name):
    c = cases.case(name, torch.float32, "cpu", dry=False)
    with ours.backend("eager"):
        out = cases.operators("eager")[c.op](**c.tensors, **c.options)
    outs = [out] if isinstance(out, torch.Tensor) else out
    assert all(o.isfinite().all() for o in outs)


def test_cases_have_initial_or_final_states_as_named():
    one = cases.case("scan, initial states only", torch.float32, "cpu", dry=True)
    other = cases.case("scan, final states only", torch.float32, "cpu", dry=True)
    assert "initial_states" in one.tensors
    assert "return_final_states" not in one.options
    assert "initial_states" not in other.tensors
    assert other.options["return_final_states"]


def test_the_sweep_changes_the_table_and_puts_it_back():
    entry = sweep.ENTRIES[0]
    today = dict(sweep.fused_plan.TABLE)
    other = next(c for c in sweep.candidates(entry) if c[entry.key] != today[entry.key])
    with sweep.using(other):
        assert sweep.fused_plan.TABLE[entry.key] == other[entry.key]
    assert today == sweep.fused_plan.TABLE


def test_the_sweep_changes_the_line_that_the_card_looks_up(monkeypatch):
    monkeypatch.setattr(
        sweep.triton_products, "family_and_processors", lambda place: ("sm_90", 132)
    )
    entry = next(e for e in sweep.ENTRIES if e.key == ("rows", 2, "usual"))
    assert list(sweep.lines(entry, entry.configs[0])) == [("rows", 2, "usual", "sm_90")]


def test_the_sweep_reports_the_fastest_line_that_is_right(tmp_path):
    entry = sweep.ENTRIES[0]
    tables = sweep.candidates(entry)
    times = {0: [2.0, 2.0], 1: [1.0, 2.0], 2: [0.5, float("inf")], 3: [0.1]}
    sweep.report(entry, tables, times, Options(tmp_path, dry=True))
    first = next(row["line"] for row in report.rows(tmp_path))
    c = tables[1][entry.key]
    assert f"tile={c.tile}, p_slice={c.p_slice}, warps={c.warps}, stages={c.stages}" in first
    assert "0.707" in first


def test_the_summary_says_how_many_times_as_fast(tmp_path):
    options = Options(tmp_path, dry=True)
    shape = {"operator": "scan", "mode": "forward", "batch": 8, "length": 4096}
    options.write("peers", **shape, by="mamba_ssm", seconds=0.003)
    options.write("peers", **shape, by="fused", seconds=0.001)
    options.write("check", case="scan", right=False)
    said = report.summary(tmp_path)
    assert "scan forward 8 x 4096: 1.000 ms, 3.00 times mamba_ssm" in said
    assert "0 of 1 checks right" in said
