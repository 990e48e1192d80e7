"""Training chooses how long its threads wait awake, before torch reads it."""

import os
import sys

import pytest
from small import environment, python
from ysnake_kernels import preemption

from ysnake.shared.waiting import CHOICES, SPINS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP library")


def seen_by_openmp(tmp_path, **chosen):
    """What the OpenMP library says that it read, in a command that imports torch."""
    inherited = {k: v for k, v in environment().items() if k not in CHOICES}
    (tmp_path / "text.txt").write_text("A snake sheds its skin. " * 200)
    done = python(
        *("ysnake.train", "--plan", "--data", "text.txt", "--d-model", "32", "--n-layers", "1"),
        cwd=tmp_path,
        env=inherited | chosen | {"OMP_DISPLAY_ENV": "verbose"},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_threads_sleep_soon(tmp_path):
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in seen_by_openmp(tmp_path)


def test_the_users_choice_stays(tmp_path):
    seen = seen_by_openmp(tmp_path, OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in seen
    assert f"GOMP_SPINCOUNT = '{SPINS}'" not in seen


def test_nothing_is_set_once_torch_is_there(monkeypatch):
    from ysnake.shared.waiting import sleep_soon

    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    sleep_soon()
    assert not [name for name in CHOICES if name in os.environ]


def test_the_operators_know_the_same_choices():
    assert CHOICES == preemption.CHOICES
