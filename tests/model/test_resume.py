"""Training that was interrupted or killed resumes and ends bit for bit as if it never was."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small import corpus, environment
from test_train import COMMAND, fit, metrics, same_training

from ysnake import train
from ysnake.training import step

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("accumulating", "carrying states")  # of "carrying and accumulating"
RESUMED = {
    "plain": [],
    "accumulating": ["--accumulate", "3"],
    "carrying states": ["--carry-state"],
    "carrying and accumulating": ["--carry-state", "--accumulate", "2"],
    "factorised head, Muon": ["--output-size", "16", "--optimizer", "muon"],
    "patience": ["--patience", "3", "--eval-every", "2", "--lr", "0.05"],
}


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if name in PARTS else [])
        for name, options in RESUMED.items()
    ],
)
def test_stopped_between_micro_batches_and_resumed_is_the_same(tmp_path, monkeypatch, options):
    """A stop is asked for at a moment inside a step, twice; the run ends as if never stopped."""
    options = ["--max-steps", "9", "--eval-every", "4", *options]
    whole = fit(tmp_path, *options)

    real = step.batch_loss
    calls = 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls in (3, 9):
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(step, "batch_loss", stopping)
    stopped = fit(tmp_path, *options)
    assert (stopped / "loss.png").exists()  # also where nothing has been evaluated yet
    while json.loads((stopped / "last/progress.json").read_text())["ended"] == "interrupted":
        assert train.main(["--run", str(stopped), "--resume"]) in (0, 130)
    assert calls > 9
    assert same_training(whole, stopped)


OF_PROCESSES = ["--max-steps", "60", "--eval-every", "30", "--checkpoint-every", "7"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    return fit(tmp_path_factory.mktemp("whole"), *OF_PROCESSES)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_interrupted_process_resumes_bit_for_bit(tmp_path, whole, name):
    """With SIGHUP the reading end of its output is closed too, as when a terminal is closed."""
    if os.name == "nt":
        pytest.skip("Windows ends a process without a signal")
    corpus(tmp_path)
    said, errors = tmp_path / "said", tmp_path / "errors"
    command = [*COMMAND, *OF_PROCESSES, "--run"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "stopped"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE if name == "SIGHUP" else said.open("w"),
        stderr=errors.open("w"),
    )
    if name == "SIGHUP":
        process.stdout.close()
    lines = tmp_path / "stopped/metrics.jsonl"
    while not lines.exists() or lines.read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 130
    assert len(metrics(tmp_path / "stopped")) < 60
    assert errors.read_text().count("stopping after this batch or evaluation") == 1
    if name == "SIGTERM":
        how = "continue: python -m ysnake.train --run stopped --resume"
        assert how in said.read_text().splitlines()
    assert train.main(["--run", str(tmp_path / "stopped"), "--resume"]) == 0
    assert same_training(whole, tmp_path / "stopped")


def test_killed_process_resumes_from_its_last_checkpoint(tmp_path, whole):
    corpus(tmp_path)
    command = [*COMMAND, *OF_PROCESSES, "--run"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "killed"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    lines = tmp_path / "killed/metrics.jsonl"
    while not lines.exists() or lines.read_text().count("\n") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert train.main(["--run", str(tmp_path / "killed"), "--resume"]) == 0
    assert same_training(whole, tmp_path / "killed")
