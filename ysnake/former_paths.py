"""Module paths of version 0.1.0, which still work: `ysnake.config` is `ysnake.model.config`.

Python asks `Finder` for a module that no file holds. An old path and its new path give the same
module object, which is imported when the old path is.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

NEW_PATHS = {
    "ysnake.checkpoint": "ysnake.checkpoints.checkpoint",
    "ysnake.config": "ysnake.model.config",
    "ysnake.data": "ysnake.text.data",
    "ysnake.decoding": "ysnake.inference.decoding",
    "ysnake.generate": "ysnake.inference.generate",
    "ysnake.prose": "ysnake.text.prose",
    "ysnake.sampling": "ysnake.inference.sampling",
    "ysnake.settings": "ysnake.training.settings",
    "ysnake.tokenizer": "ysnake.text.tokenizer",
}


class Finder:
    """Finds a module by its former path, and loads the module that has taken its place."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in NEW_PATHS:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> None:
        """None: Python makes an empty module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(NEW_PATHS[module.__name__])
