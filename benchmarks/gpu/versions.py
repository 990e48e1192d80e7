"""Stage `versions`: the card and the versions of the libraries. Without a card it fails."""

import platform
import shutil
import subprocess

import torch
import triton

from benchmarks.gpu.common import NO_CARD, Options


def run(job: str, options: Options) -> None:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "card": "none, a dry run"}
    if not options.dry:
        if not torch.cuda.is_available():
            raise RuntimeError(NO_CARD)
        about = torch.cuda.get_device_properties(0)
        found |= {"card": about.name, "multiprocessors": about.multi_processor_count}
        found |= {"memory": about.total_memory, "l2": about.L2_cache_size}
        found |= {"compiler": shutil.which("cc") or shutil.which("gcc") or "none"}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm"]
        if shutil.which("nvidia-smi"):
            said = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
            found |= {"driver and clocks": said.stdout.strip()}
    options.write("versions", **found)
