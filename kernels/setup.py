"""The operators alone, as the distribution `ysnake-kernels`: `pip install ./kernels`.

The setup.py of the whole project reads this file, so version, requirements and data are here once.
The version is that of ysnake.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# Read as text, since importing the package would need what is not installed yet.
INIT = (HERE.parent / "ysnake/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]
PYTHON = ">=3.10"
REQUIRES = ["torch>=2.11", "einops>=0.8"]
TRITON = ['triton>=3.6; platform_system == "Linux"']
PACKAGES = find_packages(str(HERE))
PACKAGE_DATA = {
    "ysnake_kernels": ["py.typed"],
    "ysnake_kernels.dropin": ["hub/build/*/*"],
    "ysnake_kernels.native": ["*.cpp", "*.hpp"],
}

if __name__ == "__main__":
    setup(
        name="ysnake-kernels",
        version=VERSION,
        description="The operators of a Mamba-2 layer in torch and Triton, for CPUs and GPUs",
        license="MIT",
        python_requires=PYTHON,
        packages=PACKAGES,
        package_data=PACKAGE_DATA,
        install_requires=[*REQUIRES, *TRITON],
    )
