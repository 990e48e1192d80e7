"""The operators' warning where another program takes the core."""

import os
import subprocess
import sys
import time

import pytest
import torch
from ysnake_kernels import preemption, rms_norm_gated

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pins processes to a core")


@pytest.fixture
def one_core(monkeypatch):
    """This process on one core, with no choice made of how its threads wait."""
    for name in preemption.CHOICES:
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def busy_loop(one_core):
    """Another process that never leaves the core of this one."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    loop.kill()
    loop.wait()


def warnings_of_a_second(monkeypatch, caplog):
    """Call an operator for a second of processor time; what it warned about."""
    monkeypatch.setattr(preemption, "watch", preemption.Watch(window=0.3))
    x, weight = torch.ones(1, 4, 8), torch.ones(8)
    end = time.process_time() + 1
    while time.process_time() < end:
        rms_norm_gated(x, weight)
    return caplog.messages


def test_one_warning_says_what_helps(busy_loop, monkeypatch, caplog):
    assert warnings_of_a_second(monkeypatch, caplog) == [f"warning: {preemption.ADVICE}"]


def test_no_warning_once_the_user_has_chosen(busy_loop, monkeypatch, caplog):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert warnings_of_a_second(monkeypatch, caplog) == []
