"""ysnake, "Why Snakes": train and run a Mamba-2 language model on a CPU or a GPU.

`ysnake.load` reads a trained model. Modules are imported where they are used, so that `import
ysnake` costs nothing.
"""

import sys

from ysnake.former_paths import Finder
from ysnake.language_model import LanguageModel, load

__all__ = ["LanguageModel", "load"]

__version__ = "0.1.0"

sys.meta_path.append(Finder())
