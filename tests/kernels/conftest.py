"""What the operators' tests share: memory that a kernel forgot to write shows up as NaN, compiled
code does not stand in for torch, and a folder has the built package.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ysnake_kernels.native import build

# torch caches the functions that obey torch.device; the cache is filled before we replace some
with torch.device("cpu"):
    torch.empty(0)


def _poisoned(make):
    def empty(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return empty


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch):
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", _poisoned(torch.empty_strided))


@pytest.fixture(autouse=True)
def which_step(monkeypatch):
    """`eager` is pure torch, also where compiled code would stand in. test_native.py tests that."""
    monkeypatch.setattr(build, "ready", lambda: False)


@pytest.fixture(scope="session")
def site_packages(tmp_path_factory):
    """A folder with what a built package puts into site-packages."""
    pytest.importorskip("setuptools")
    root = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("site-packages")
    code = "import sys; sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', sys.argv[1]]; "
    code += "exec(open('setup.py', encoding='utf-8').read())"
    subprocess.run([sys.executable, "-c", code, folder], cwd=root, check=True, capture_output=True)
    return folder
