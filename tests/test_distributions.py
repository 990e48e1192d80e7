"""The two distributions of this repository: what their metadata say, without a build."""

import json
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import ysnake

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
BUILD = """
import json, os, sys
from distutils.core import run_setup  # of setuptools
os.chdir(sys.argv[1])
found = run_setup("setup.py", ["-q", "egg_info", "--egg-base", sys.argv[2]])
print(json.dumps({"packages": found.packages, "data": found.package_data}))
"""


def metadata(folder, out):
    """The metadata of a wheel, and the packages that it would have."""
    out.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", f"import setuptools{BUILD}", folder, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (info,) = out.glob("*.egg-info")
    return Distribution.at(info), json.loads(done.stdout.splitlines()[-1])


def test_the_operators_alone_and_the_whole_share_what_they_have_in_common(tmp_path):
    alone, alone_has = metadata(ROOT / "kernels", tmp_path / "alone")
    whole, whole_has = metadata(ROOT, tmp_path / "whole")
    assert (alone.name, whole.name) == ("ysnake-kernels", "ysnake")
    assert alone.version == whole.version == ysnake.__version__
    assert [re.match(r"\w+", each)[0] for each in alone.requires] == ["torch", "einops", "triton"]
    assert "Linux" in alone.requires[2]
    assert set(alone.requires[:2]) < set(whole.requires)
    assert alone.metadata["Requires-Python"] == whole.metadata["Requires-Python"]
    kernels = ROOT / "kernels"
    folders = {path.parent for path in (kernels / "ysnake_kernels").rglob("__init__.py")}
    packages = {".".join(path.relative_to(kernels).parts) for path in folders}
    packages = {name for name in packages if ".hub." not in name}  # data for another program
    assert set(alone_has["packages"]) == packages
    assert packages < set(whole_has["packages"])
    assert "ysnake.training" in whole_has["packages"]
    assert alone_has["data"].items() <= whole_has["data"].items()


def test_files_that_are_not_python_are_installed(tmp_path):
    _, whole = metadata(ROOT, tmp_path / "whole")
    roots = {"ysnake": ROOT, "ysnake_kernels": ROOT / "kernels"}
    there = {
        path
        for name, root in roots.items()
        for path in (root / name).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    covered = {
        path
        for package, patterns in whole["data"].items()
        for pattern in patterns
        for path in roots[package.split(".")[0]].joinpath(*package.split(".")).glob(pattern)
    }
    assert there <= covered
