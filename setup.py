"""One distribution of two import packages: `ysnake`, and `ysnake_kernels` from kernels/.

kernels/setup.py builds the operators alone. It holds what both distributions share.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SERVE = ["starlette>=1.7", "uvicorn>=0.54"]
GGUF = ["gguf>=0.17"]
DOCS = ["pdoc>=15"]
# the tools of `train --log`
LOGS = {
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.19"],
    "trackio": ["trackio>=0.20"],
}
# programs that the tests run with the drop-in
PEERS = ["transformers>=5", "accelerate>=1.1", "peft>=0.18", "trl>=0.24", "lm-eval>=0.4.9"]
PEERS += ["joblib>=1.4", "scipy>=1.14"]
# Torch for GPUs installs the Triton that it needs. Torch for CPUs installs none. Only tests and
# benchmarks need Triton on a CPU.
KERNELS = runpy.run_path("kernels/setup.py")
TRITON = KERNELS["TRITON"]

# Python runs this line when it starts; see ysnake_dropin_hook.
HOOK = "import os; os.environ.get('YSNAKE_DROPIN') and __import__('ysnake_dropin_hook')"


class BuildWithHook(build_py):
    """Also installs the hook, except for an editable install."""

    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self._hook()).write_text(HOOK + "\n", encoding="utf-8")

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, self._hook()]

    def _hook(self):
        return str(Path(self.build_lib, "ysnake_dropin.pth"))


setup(
    name="ysnake",
    version=KERNELS["VERSION"],
    description="Why Snakes: train and run a Mamba-2 language model on any machine",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=KERNELS["PYTHON"],
    packages=[*find_packages(include=["ysnake", "ysnake.*"]), *KERNELS["PACKAGES"]],
    py_modules=["ysnake_dropin_hook"],
    package_dir={"": "kernels", "ysnake": "ysnake"},
    cmdclass={"build_py": BuildWithHook},
    package_data={
        "ysnake": ["py.typed"],
        "ysnake.data_generation": ["lists/*.txt"],
        "ysnake.serving": ["page.html", "watch.html"],
        **KERNELS["PACKAGE_DATA"],
    },
    install_requires=[
        'tomli>=2; python_version < "3.11"',
        *KERNELS["REQUIRES"],
        "ollama>=0.5",
        "httpx>=0.27",
        "jinja2>=3.1.6",
        "markdown-it-py>=3",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "numpy>=1.26",
        "tyro>=1.0.17",
        "docstring-parser>=0.16",
        "rich>=13.9",
        "matplotlib>=3.9",
    ],
    entry_points={"console_scripts": ["ysnake = ysnake.__main__:console_script"]},
    extras_require={
        "serve": SERVE,
        "gguf": GGUF,
        **LOGS,
        "docs": DOCS,
        "peers": PEERS,
        "test": [
            *("pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.6"),
            *("transformers>=5", "ruff>=0.12", "mypy>=1.18"),
            *("hypothesis>=6.100", "nbclient>=0.10", "ipykernel>=6.29"),
            *SERVE,
            *GGUF,
            *DOCS,
            *LOGS["tensorboard"],
            *TRITON,
        ],
        "bench": ["pytest-benchmark>=5", "transformers>=5", *TRITON],
    },
)
