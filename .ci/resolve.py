#!/usr/bin/env python3
"""Check that the README's two install lines can be resolved, without installing anything.

uv reads the metadata of the public package index for every supported Python and system. It accepts
only wheels. So it is also an error if a pinned version has no wheel for one of them. Without a
connection to the index the check is skipped.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
INDEX = os.environ.get("UV_DEFAULT_INDEX", "https://pypi.org/simple")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = (
    *("x86_64-manylinux_2_28", "aarch64-manylinux_2_28"),
    *("aarch64-apple-darwin", "x86_64-pc-windows-msvc"),
)
OLDEST_MACOS = "14.0"  # torch has no wheels for older systems
LINE = re.compile(r"^pip install (?P<packages>-c .*) && (?:pytest|python) .*$", re.MULTILINE)


def why_unreachable() -> str | None:
    """Say why the index cannot be reached, or None if it can."""
    try:
        with urllib.request.urlopen(f"{INDEX}/pip/", timeout=30):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else str(error)
    except OSError as error:
        return str(error)


def install_uv(folder: str) -> None:
    """Install the pinned uv into a folder, with the pip of this Python."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", "constraints.txt", "--target", folder, "uv"], cwd=ROOT, check=True)


def resolve(uv_folder: str, packages: str, platform: str, python: str) -> bool:
    """Resolve one line for one Python and system. Prints uv's reason if that fails."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--dry-run",
        "--no-config",
        "--system-certs",
    ]
    command += ["--quiet", "--only-binary", ":all:", "--target", f"{uv_folder}/empty"]
    command += ["--python-version", python, "--python-platform", platform]
    environment = os.environ | {
        "PYTHONPATH": uv_folder,
        "MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS,
    }
    done = subprocess.run(
        [*command, *shlex.split(packages)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    case = f"Python {python} {platform}: {packages}"
    print(f"ok {case}" if done.returncode == 0 else f"FAILED {case}\n{done.stderr.strip()}")
    return done.returncode == 0


def main() -> int:
    """Resolve both lines for every Python and system. Returns 0 if all succeed, else 1."""
    reason = why_unreachable()
    if reason:
        print(f"skipped: the package index {INDEX} cannot be reached: {reason}")
        return 0
    lines = LINE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    if len(lines) != 2:
        print(f"README.md: expected 2 lines that install and then run, got {len(lines)}")
        return 1
    with tempfile.TemporaryDirectory() as uv_folder, ThreadPoolExecutor(4) as pool:
        install_uv(uv_folder)
        cases = product([uv_folder], lines, PLATFORMS, PYTHONS)
        results = list(pool.map(lambda case: resolve(*case), cases))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
