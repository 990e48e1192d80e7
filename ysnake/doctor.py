"""`python -m ysnake.doctor`: a report about this machine and what ysnake uses of it.

The report can be pasted into a bug report. It names no user, file or network.
"""

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

from ysnake import __version__
from ysnake.shared import cli, control_groups
from ysnake.shared.processor import bfloat16_products

PACKAGES = ("torch", "triton", "einops", "tokenizers", "safetensors", "numpy", "transformers")
ALONE = "ysnake-kernels"  # the distribution of the operators alone
MISSING = "not installed"
EXTRAS = {
    "serve": ("starlette", "uvicorn"),
    "gguf": ("gguf",),
    **{tool: (tool,) for tool in ("tensorboard", "wandb", "trackio")},
    "test": ("pytest", "hypothesis", "xdist"),
}
OPERATORS, RIGHT = "operators against the reference", "right"  # a line of the self-test
SECONDS = 3.0  # how long each part of the self-test measures


@dataclass
class Options:
    """Report what this machine has, what ysnake uses of it and why, and how fast it is. Paste the
    report into a bug report."""

    no_test: bool = False
    """Skip the self-test, which takes about 15 seconds."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Print the report; returns 0, or 1 if the operators were wrong or failed in the self-test."""
    options = cli.parse(Options, argv, cli.command_line("doctor", program))
    cli.use_threads(None)  # as the other commands
    console = cli.console()
    for title, facts in (
        ("machine", machine()),
        ("packages", packages()),
        ("torch", torch_facts()),
        ("implementation of the operators", implementations()),
    ):
        show(console, title, facts)
    if options.no_test:
        return cli.DONE
    results = self_test()
    show(console, "self-test", results)
    return cli.DONE if results[OPERATORS].startswith(RIGHT) else cli.FAILED


def show(console, title: str, facts: dict[str, str]) -> None:
    console.print(f"[bold]{title}[/]")
    home = os.path.expanduser("~")
    for name, value in facts.items():
        if len(home) > 1:  # not "/" or "~"
            value = value.replace(home, "~")
        console.print(f"  {cli.markup(name)}: {cli.markup(value)}")


def answer(question: Callable[[], object]) -> str:
    """What the question returns, as text. If it fails: the error in one line."""
    try:
        return str(question())
    except Exception as error:  # each question asks another library, and the report must go on
        return f"not known ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def machine() -> dict[str, str]:
    return {
        "ysnake": __version__,
        "python": platform.python_version(),
        "system": answer(platform.platform),
        "processor": answer(processor),
        "cores": answer(cores),
        "memory": answer(memory),
        "C compiler": next(filter(shutil.which, ("cc", "gcc", "cl")), "none"),
    }


def processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def cores() -> str:
    limit = control_groups.cpu_limit()
    limited = "" if limit is None else f", of which this process may use the time of {limit:g}"
    return f"{os.cpu_count()}{limited}"


def memory() -> str:
    from ysnake.training.memory import available

    size = available()
    return "not known" if size is None else f"{size / 1e9:.1f} GB, of this machine or container"


def packages() -> dict[str, str]:
    """The versions of packages, and which extras are installed."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return MISSING

    found = {name: version(name) for name in PACKAGES}
    if (second := version(ALONE)) != MISSING:
        found[ALONE] = f"{second}; it hides ysnake's own operators: pip uninstall {ALONE}"
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        state = f"not installed ({', '.join(missing)} missing)" if missing else "installed"
        found[f"extra [{extra}]"] = state
    return found


def torch_facts() -> dict[str, str]:
    import torch

    facts = {
        "threads": answer(torch.get_num_threads),
        "CPU kernels": answer(torch.backends.cpu.get_cpu_capability),
        "oneDNN": answer(torch.backends.mkldnn.is_available),
        "MKL": answer(torch.backends.mkl.is_available),
        "16-bit products on the CPU": answer(sixteen_bits),
        "CUDA": answer(lambda: torch.version.cuda or "none, built without"),
        "HIP": answer(lambda: torch.version.hip or "none, built without"),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts[f"GPU {i}"] = answer(partial(gpu, i))
    else:
        facts["GPU"] = "none that torch can use"
    return facts


def sixteen_bits() -> str:
    return ", ".join(bfloat16_products()) or "none known"


def gpu(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    name = f"{about.name}, {about.total_memory / 1e9:.0f} GB"
    return f"{name}, sm_{about.major}{about.minor}, {about.multi_processor_count} multiprocessors"


def implementations() -> dict[str, str]:
    """The implementation of the operators that each device uses, and why."""
    import torch
    from ysnake_kernels.backend import choose

    has_triton = importlib.util.find_spec("triton") is not None
    forced = os.environ.get("YSNAKE_BACKEND")
    why = f"YSNAKE_BACKEND={forced}" if forced else "the default on a CPU"
    facts = {"CPU": f"{answer(lambda: choose(torch.empty(0)))} ({why})"}
    facts["generating on the CPU"] = written_by()
    if torch.cuda.is_available():
        if not forced:
            why = "Triton is installed" if has_triton else "Triton is not installed: slow"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if has_triton and not compiler:
            why += "; Triton needs a C compiler, which is missing"
        facts["GPU"] = f"{answer(lambda: choose(torch.empty(0, device='cuda')))} ({why})"
    return facts


def written_by() -> str:
    """Whether compiled code or pure torch generates text on a CPU, and why."""
    from ysnake_kernels.native.build import BuildError, library

    try:
        library()
    except BuildError as error:
        return f"pure torch ({error}): slower"
    return "code compiled for this processor"


def self_test() -> dict[str, str]:
    """Compare the operators with their definition, and measure speeds."""
    import torch

    device = cli.pick_device("auto")
    facts = {
        "device": device,
        OPERATORS: answer(lambda: operators(device)),
        "matrix products, float32": answer(lambda: products(device, torch.float32)),
        "matrix products, bfloat16": answer(lambda: products(device, torch.bfloat16)),
        "training, quick preset, 8 x 128": answer(lambda: training(device)),
        "generating, quick preset": answer(lambda: writing(device)),
    }
    return facts


def operators(device: str) -> str:
    """Compare the scan and its gradients with the loop that defines them, in float64."""
    import torch
    from ysnake_kernels import backend, ssd_scan

    torch.manual_seed(0)
    shapes = {"x": (2, 70, 4, 16), "dt": (2, 70, 4), "B": (2, 70, 1, 16), "C": (2, 70, 1, 16)}
    given: dict[str, Any] = {n: torch.randn(shape, device=device) for n, shape in shapes.items()}
    given["A"] = -torch.rand(4, device=device)

    def found(exact: bool) -> list[torch.Tensor]:
        leaves = {k: (t.double() if exact else t).requires_grad_() for k, t in given.items()}
        y: Any
        if exact:
            with backend("reference"):
                y = ssd_scan(**leaves, dt_softplus=True)
        else:
            y = ssd_scan(**leaves, dt_softplus=True)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    given = {name: t.detach() for name, t in given.items()}
    pairs = list(zip(found(False), found(True), strict=True))
    far = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    return f"{RIGHT if far < 1e-3 else 'WRONG'}, largest relative error {far:.0e}"


def repeated(work: Callable[[], object], device: str) -> float:
    """The shortest time of a call in seconds, among repeated calls during SECONDS."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return max(time.perf_counter() - began, 1e-9)

    once()
    until, best = time.perf_counter() + SECONDS, once()
    while time.perf_counter() < until:
        best = min(best, once())
    return best


def products(device: str, dtype) -> str:
    import torch

    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return f"{2 * size**3 / repeated(lambda: a @ b, device) / 1e9:,.0f} GFLOP/s"


def quick_model(device: str):
    import torch

    from ysnake.model import Model
    from ysnake.model.config import PRESETS, ModelConfig

    preset = PRESETS["quick"]
    sizes = {name: preset.settings[name] for name in ("d_model", "n_layers", "d_state")}
    torch.manual_seed(0)
    return Model(ModelConfig(vocab_size=preset.max_vocab, **sizes)).to(device)


def training(device: str) -> str:
    import torch

    model = quick_model(device)
    ids = torch.randint(model.config.vocab_size, (8, 128), device=device)

    def step() -> None:
        model.zero_grad()
        model.loss(ids, ids).backward()

    return f"{ids.numel() / repeated(step, device):,.0f} tokens/s, without the optimizer"


def writing(device: str) -> str:
    import torch

    from ysnake.inference.decoding import Decoder

    model = quick_model(device)
    decoder, state = Decoder(model), model.empty_state(1)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    return f"{1 / repeated(lambda: decoder.step(ids, state), device):,.0f} tokens/s"


if __name__ == "__main__":
    cli.run(main)
