"""Decoding on a GPU by replays of CUDA graphs.

A graph reads and writes the state with which it was captured. So it is used again only where the
same state comes again.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from ysnake_kernels.layers_step import layers_step

from ysnake.model.cuda_graph import Graph
from ysnake.model.network import Model, State

MOST = 32  # graphs that are kept: one for each number of rows in a server's batch


class ReplayedStep:
    """One token for each row. Replayed as soon as the same state has come twice."""

    def __init__(self, model: Model):
        """Keeps the decay rates as they are now. Other weights may change in place."""
        self.model = model
        with torch.no_grad():
            self.layers = [block.step_weights() for block in model.backbone.layers]
        self.graphs: OrderedDict[tuple, Graph | None] = OrderedDict()
        self.pool: Any = None

    def __call__(self, ids: Tensor, state: State) -> Tensor:
        """Logits (batch, vocab_size) of ids (batch,); updates the state in place."""
        tensors = [t for layer in state for t in (layer.conv, layer.ssm)]
        key = (ids.shape, *[(t.data_ptr(), t.stride()) for t in tensors])
        if key not in self.graphs:
            self.graphs[key] = None
            while len(self.graphs) > MOST:
                self.graphs.popitem(last=False)
            return self.write(ids, state)
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        if graph is None:
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = Graph(lambda given: [self.write(given[0], state)], [ids], self.pool)
            self.graphs[key] = graph
        return graph([ids])[0]

    def write(self, ids: Tensor, state: State) -> Tensor:
        """As `Model.step`, with fewer kernels."""
        backbone = self.model.backbone
        states = [(layer.conv, layer.ssm) for layer in state]
        last = (backbone.norm_f.weight, backbone.norm_f.eps)
        h = layers_step(backbone.embed(ids), states, self.layers, *last)
        return self.model.lm_head(h)
