"""ysnake, "Why Snakes": train and run a Mamba-2 language model on a CPU or a GPU.

`ysnake.train` trains a model, `ysnake.load` reads a trained one. Modules are imported where they
are used, so that `import ysnake` costs nothing.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ysnake.former_paths import Finder
from ysnake.language_model import LanguageModel, load
from ysnake.trained_run import TrainedRun

if TYPE_CHECKING:
    from ysnake.trained_run import train

__all__ = ["LanguageModel", "TrainedRun", "load", "train"]

__version__ = "0.1.0"

sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    """Import the module `ysnake.train`, which can be called, when it is first used."""
    if name == "train":
        return importlib.import_module("ysnake.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
