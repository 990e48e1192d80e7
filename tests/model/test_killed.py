"""Runs that are killed with -9 at any moment, and disks that fill up: no run is ever lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small import TINY, corpus, environment

KINDS = ([], ["--carry-state"], ["--output-size", "16", "--accumulate", "2"])
# a checkpoint each step, so that most of the time goes into writing
OPTIONS = [*TINY, "--vocab-size", "300", "--threads", "1", "--max-steps", "12"]
OPTIONS += ["--eval-every", "6", "--checkpoint-every", "1"]


class Zygote:
    """Trains in processes of their own, without the seconds that each would need to import."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, *argv, seconds=None, path=None):
        command = {"argv": [*map(str, argv)], "seconds": seconds, "path": path and str(path)}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def zygote():
    if not hasattr(os, "pidfd_open"):
        pytest.skip("waits for processes as Linux alone can")
    one = Zygote()
    yield one
    one.process.stdin.close()
    one.process.wait(60)


def outcome(run):
    """All of a run that does not depend on how long it took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_s"]
    return {
        "metrics": lines,
        "last": (run / "last/model.safetensors").read_bytes(),
        "best": (run / "best/model.safetensors").read_bytes(),
    }


def kill_and_resume(zygote, argv, run, chance, whole):
    """Train to the end through one to four kills; returns for each whether it tore a save."""
    torn = []

    def go_on(**kill):
        command = ["--run", run, "--resume"] if run.exists() else [*argv, "--run", run]
        ended = zygote.train(*command, **kill)
        assert ended["code"] in (0, -signal.SIGKILL), ended["errors"]
        return ended["code"] == 0

    def tears():
        unfinished = any((run / name).exists() for name in ("last.new", "best.new"))
        return unfinished or (run.exists() and not (run / "last").exists())

    after = chance.uniform(0, whole / 2)
    while go_on(seconds=after, path=run / "last.new"):  # the first kill waits for a save to begin
        shutil.rmtree(run)  # it had come to its end before
        after /= 4
    torn.append(tears())
    for _ in range(chance.randint(0, 3)):  # the others hit whatever there is
        if go_on(seconds=chance.uniform(0, whole)):
            return torn
        torn.append(tears())
    assert go_on()
    return torn


@pytest.mark.parametrize("runs", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_never_killed(zygote, tmp_path, runs):
    """Bit for bit in the weights and line for line in the metrics; some kills hit a save."""
    data = corpus(tmp_path)
    chance = random.Random(runs)
    expected, seconds = [], []
    kinds = KINDS if runs > 5 else KINDS[1:]
    for i, options in enumerate(kinds):
        argv = [*OPTIONS, *options, "--data", data]
        seconds.append(zygote.train(*argv, "--run", tmp_path / f"whole{i}")["seconds"])
        expected.append(outcome(tmp_path / f"whole{i}"))
    torn = []
    for n in range(runs):
        i, run = n % len(kinds), tmp_path / f"killed{n}"
        argv = [*OPTIONS, *kinds[i], "--data", data]
        kills = kill_and_resume(zygote, argv, run, chance, seconds[i])
        assert outcome(run) == expected[i], f"run {n}, after {len(kills)} kills"
        torn += kills
    print(f"{len(torn)} kills of {runs} runs, {sum(torn)} inside a save")
    assert any(torn)
