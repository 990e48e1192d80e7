"""The Mamba-2 language model: its sizes, its layers, its first weights and its training loss.

The names below are imported when they are asked for. So `ysnake.model.config` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ysnake.model.initialisation import initialise
    from ysnake.model.network import LayerState, Model, State

__all__ = ["LayerState", "Model", "State", "initialise"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ysnake.model import network

    return getattr(network, name)
