"""Training on a GPU by replays of CUDA graphs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ysnake.model.cuda_graph import Function, Graph


class Replays:
    """Calls of one function, replayed from the second call on with tensors of the same shapes."""

    def __init__(self, function: "Function"):
        self.function = function
        self.graphs: dict[tuple, Graph | None] = {}
        self.pool: Any = None

    def __call__(self, given: "Sequence[Tensor | None]") -> "list[Tensor]":
        """What the function returns; None among the tensors is part of their shapes."""
        key = tuple(None if t is None else t.shape for t in given)
        if key not in self.graphs:
            self.graphs[key] = None
            return self.function(given)
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = self._capture(given)
        return graph(given)

    def _capture(self, given: "Sequence[Tensor | None]") -> "Graph":
        import torch

        from ysnake.model.cuda_graph import Graph
        from ysnake.shared.errors import InputError

        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            return Graph(self.function, given, self.pool)
        except RuntimeError as error:
            raise InputError(
                f"This GPU could not capture a training step as a CUDA graph ({error}); "
                "train with --no-graphs"
            ) from error
