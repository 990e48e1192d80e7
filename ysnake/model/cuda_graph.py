"""A function of tensors as a CUDA graph.

A small model's kernels take a GPU less time than Python needs to launch them. A CUDA graph launches
them all at once, on the same tensors each time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Sequence[Any]], list[Tensor]]  # of tensors and Nones


class Graph:
    """The CUDA graph of a function that has run before, so that its kernels are compiled."""

    def __init__(self, function: Function, given: Sequence[Tensor | None], pool: Any):
        """Capture function(given).

        Args:
            given: tensors of the shapes that all calls have; None stays None.
            pool: of `torch.cuda.graph_pool_handle`, the memory that graphs share which run one
                after another.
        """
        self.given = [None if t is None else t.clone() for t in given]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Other threads may use the GPU in the meantime.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.results = function(self.given)

    def __call__(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """Replay the graph on these tensors.

        Returns copies of the results, since the next graph of the pool overwrites the results.
        """
        for own, t in zip(self.given, given, strict=True):
            if own is not None and t is not None:
                own.copy_(t)
        self.graph.replay()
        return [t.clone() for t in self.results]
