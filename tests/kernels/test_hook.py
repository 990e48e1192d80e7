"""The environment variable that installs the drop-in in a program that nobody edits."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def program(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs code as a program that knows nothing of us, with `folder` as its site-packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "YSNAKE_DROPIN")}
    code = f"import site; site.addsitedir({str(folder)!r})\n{code}"
    command = [sys.executable, "-c", code]
    environment |= variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


WHOSE = """
import sys
assert "torch" not in sys.modules and "ysnake_kernels" not in sys.modules  # nothing is slower yet
import {package}
print({package}.__version__)
if "{package}" == "transformers":
    from transformers.models.lfm2 import modeling_lfm2
    found = [c.cell_contents for c in modeling_lfm2.causal_conv1d_fn.__closure__]
    print({{getattr(f, "__module__", None) for f in found}})
"""


@pytest.mark.skipif(
    bool(find_spec("mamba_ssm") or find_spec("causal_conv1d")), reason="the real ones are installed"
)
@pytest.mark.parametrize("package", ["mamba_ssm", "causal_conv1d"])
def test_a_program_finds_the_packages(site_packages, package):
    done = program(site_packages, WHOSE.format(package=package), YSNAKE_DROPIN="1")
    assert done.returncode == 0, done.stderr
    assert "+ysnake" in done.stdout
    without = program(site_packages, WHOSE.format(package=package))
    assert f"No module named '{package}'" in without.stderr


@pytest.mark.skipif(
    bool(find_spec("mamba_ssm") or find_spec("causal_conv1d")), reason="the real ones are installed"
)
def test_models_of_transformers_get_our_operators(site_packages):
    pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    code = WHOSE.format(package="transformers")
    done = program(site_packages, code, YSNAKE_DROPIN="fused")
    assert done.returncode == 0, done.stderr
    assert "ysnake_kernels.dropin.for_transformers" in done.stdout


def test_another_value_is_refused_in_one_line(site_packages):
    done = program(site_packages, "import mamba_ssm", YSNAKE_DROPIN="yes")
    assert done.stderr.strip().splitlines()[-1] == (
        "ValueError: YSNAKE_DROPIN: expected 1 or fused, got 'yes'"
    )
    nothing = program(site_packages, "import sys; print(*sys.meta_path)", YSNAKE_DROPIN="0")
    assert "FirstImport" not in nothing.stdout
