"""Two import packages in one distribution: `ysnake`, and `ysnake_kernels` from kernels/."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = ["starlette>=1.7", "uvicorn>=0.54"]
GGUF = ["gguf>=0.17"]
# Torch for GPUs brings the Triton that it needs. Torch for CPUs brings none, and only tests and
# benchmarks need one there.
TRITON = ['triton>=3.6; platform_system == "Linux"']

setup(
    name="ysnake",
    version="0.1.0",
    description="Why Snakes: train and run a Mamba-2 language model on any machine",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["ysnake", "ysnake.*"]), *find_packages("kernels")],
    package_dir={"ysnake_kernels": "kernels/ysnake_kernels"},
    package_data={
        "ysnake": ["py.typed"],
        "ysnake.data_generation": ["lists/*.txt"],
        "ysnake.serving": ["page.html"],
        "ysnake_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "einops>=0.8",
        "ollama>=0.5",
        "httpx>=0.27",
        "markdown-it-py>=3",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "numpy>=1.26",
        "tyro>=0.9.13",
        "rich>=13.9",
        "matplotlib>=3.9",
    ],
    extras_require={
        "serve": SERVE,
        "gguf": GGUF,
        "test": [
            *("pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.6"),
            *("transformers>=5", "ruff>=0.12"),
            "hypothesis>=6.100",
            *SERVE,
            *GGUF,
            *TRITON,
        ],
        "bench": ["pytest-benchmark>=5", "transformers>=5", *TRITON],
    },
)
