"""Install the drop-in in a program that nobody edits: lm_eval, accelerate launch, trl.

Python imports this when it starts, by ysnake_dropin.pth, if the environment variable YSNAKE_DROPIN
is set: to `1` for `ysnake_kernels.dropin.install()`, or to `fused` for its `fused_training`. It
costs nothing until the program imports transformers, mamba_ssm or causal_conv1d.
"""

import os
import sys
from importlib.machinery import ModuleSpec

VARIABLE = "YSNAKE_DROPIN"
CHOICES = {"1": {}, "fused": {"fused_training": True}}
PACKAGES = ("transformers", "mamba_ssm", "causal_conv1d")


class FirstImport:
    """A finder on sys.meta_path that installs the drop-in just before the first of PACKAGES."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        sys.meta_path.remove(self)
        choice = os.environ.get(VARIABLE)
        if choice not in CHOICES:
            raise ValueError(f"{VARIABLE}: expected {' or '.join(CHOICES)}, got {choice!r}")
        import ysnake_kernels.dropin

        ysnake_kernels.dropin.install(**CHOICES[choice])
        made = sys.modules.get(name)  # none for transformers, and for a real package
        return None if made is None else made.__spec__


if os.environ.get(VARIABLE) not in (None, "", "0"):
    sys.meta_path.insert(0, FirstImport())
