"""What all parts of the test share: the error for something that was lost."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Lost(Exception):
    """The project lost or broke something. The message says what, and how to repeat it."""


def environment() -> dict[str, str]:
    """The environment in which a command finds the packages, whether installed or not."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024
