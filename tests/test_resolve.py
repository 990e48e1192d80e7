"""The check of the install lines, where there is no network."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "resolve.py"


def test_an_index_that_cannot_be_reached_is_named_and_the_check_skipped():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: the package index http://127.0.0.1:9/simple")
