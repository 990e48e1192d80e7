"""An H100 that is not there: Triton compiles and launches for sm_90, and the launches do nothing.

Tensors lie in host memory. The active driver of Triton belongs to a process, so each use needs a
process of its own, without TRITON_INTERPRET.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

SOURCE = Path(__file__).with_name("stand_in_driver.c")
ROOT = SOURCE.parents[2]
MULTIPROCESSORS = 132


def missing() -> str | None:
    """What this machine lacks to build the stand-in and Triton's launcher, or None."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "Triton's compiler for CUDA is for Linux on x86-64"
    if not _compiler():
        return "there is no C compiler"
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    return None if header.exists() else "Python's header files are not installed"


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def start(script: str, *arguments: str) -> subprocess.Popen:
    """Start a script of this folder in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [environment.get("PYTHONPATH", ""), str(ROOT / "kernels"), str(ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(SOURCE.with_name(script)), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@contextmanager
def gpu() -> Iterator[Callable[[], int]]:
    """Let Triton launch on the stand-in; gives a function that counts the launches so far."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        library = _built(Path(folder))
        launches = ctypes.c_ulonglong.in_dll(library, "stand_in_launches")
        activate(launches=True)
        with fused_on_cpu():
            yield lambda: launches.value


def _built(folder: Path) -> ctypes.CDLL:
    """The library, loaded under the name by which Triton's launcher looks for the driver."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    path = folder / "libcuda.so.1"
    command = [_compiler(), "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{path.name}"]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def activate(launches: bool) -> None:
    """Make Triton compile for an H100; without `launches` it cannot load what it compiles."""
    import torch
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class StandIn(nvidia.CudaDriver):
        def __init__(self) -> None:  # not the parent's, which asks torch for the GPU
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)
            if launches:
                self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(StandIn())


@contextmanager
def fused_on_cpu(multiprocessors: int = MULTIPROCESSORS) -> Iterator[None]:
    """Let the operators take the fused path for tensors in host memory, as for an H100's."""
    backend = import_module("ysnake_kernels.backend")
    products = import_module("ysnake_kernels.triton_products")
    for package in ("ssd", "layers_step"):  # all that ask for the device
        import_module(f"ysnake_kernels.{package}.fused")
    name = "family_and_processors"
    real = getattr(products, name)
    ours = [module for name, module in sys.modules.items() if name.startswith("ysnake_kernels")]
    with ExitStack() as patches:
        patches.enter_context(patch.object(backend, "_choose", lambda device: "fused"))
        for module in ours:
            if getattr(module, name, None) is real:
                stand_in = patch.object(module, name, lambda place: ("sm_90", multiprocessors))
                patches.enter_context(stand_in)
        yield
