"""Stage `sweep-layers`: find the fastest tile of the recurrence for one token through a layer.

It prints the fastest for `tile` in kernels/ysnake_kernels/layers_step/fused.py. The stages `check`
and `sanitize` use the layers of this file too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import ysnake_kernels as ours
from torch import Tensor
from ysnake_kernels.layers_step import fused, layers_step
from ysnake_kernels.layers_step.fused import Tile
from ysnake_kernels.layers_step.inputs import LayerWeights
from ysnake_kernels.mixer import MixerSizes
from ysnake_kernels.mixer_step import MixerWeights

from benchmarks.gpu.cases import finite
from benchmarks.gpu.common import Options, reason, seconds

BATCHES = (1, 4, 16, 64, 256)
TINY = {"d_model": 64, "state": 16}
TILES = [
    *(Tile(elements, tiles, 1) for elements, tiles in ((512, 4), (512, 8), (1024, 1), (1024, 4))),
    *(Tile(elements, tiles, 2) for elements in (1024, 2048) for tiles in (1, 2, 4)),
    *(Tile(elements, tiles, 4) for elements in (1024, 2048, 4096) for tiles in (1, 2, 4)),
    *(Tile(elements, tiles, 8) for elements, tiles in ((4096, 1), (4096, 2), (8192, 1))),
    Tile(1024, 8, 2),
]


@dataclass
class Stack:
    """Layers that are all the same, each with a state of its own."""

    h: Tensor
    states: list[tuple[Tensor, Tensor]]
    weights: LayerWeights

    def step(self) -> Tensor:
        w = self.weights
        layers = [w] * len(self.states)
        return layers_step(self.h.clone(), self.states, layers, w.norm_weight, w.eps)

    def in_float64(self) -> "Stack":
        """A copy in float64."""

        def exact(t: object) -> object:
            return t.double().clone() if isinstance(t, Tensor) else t

        w = self.weights
        mixer = MixerWeights(*map(exact, w.mixer))
        weights = LayerWeights(*(mixer if t is w.mixer else exact(t) for t in w))
        states = [(exact(conv), exact(ssm)) for conv, ssm in self.states]
        return Stack(self.h.double(), states, weights)


def stack(
    batch: int,
    dtype: torch.dtype,
    device: str,
    layers: int = 2,
    groups: int = 1,
    d_model: int = 768,
    state: int = 128,
) -> Stack:
    """Layers with random weights. The residual stream is in float32, or float64 as `dtype`."""
    torch.manual_seed(batch)
    exact = torch.promote_types(dtype, torch.float32)
    sizes = MixerSizes(2 * d_model, d_model // 32, groups, state)
    features, channels = sum(sizes.projection), sizes.channels

    def randn(*shape: int, dtype: torch.dtype = dtype, scale: float = 1) -> Tensor:
        return (torch.randn(*shape, dtype=exact) * scale).to(device, dtype)

    heads = partial(randn, sizes.heads, dtype=exact)
    inner = (randn(channels, 4, scale=0.5), randn(channels), heads() - 3, -heads().exp(), heads())
    mixer = MixerWeights(*inner, randn(sizes.d_inner), sizes, (0.0, float("inf")), 1e-5)
    into, out = randn(features, d_model, scale=d_model**-0.5), randn(d_model, sizes.d_inner)
    weights = LayerWeights(randn(d_model), 1e-5, into, None, mixer, out / 64, randn(d_model))
    conv, ssm = randn(batch, 3, channels), randn(batch, sizes.heads, 64, state, dtype=exact)
    states = [(conv.clone().mT, ssm.clone()) for _ in range(layers)]
    return Stack(randn(batch, d_model, dtype=exact), states, weights)


def compare(batch: int, groups: int, dtype: torch.dtype, options: Options) -> dict:
    """Three tokens through two fused layers and through the reference in float64: a row."""
    from comparison import TOLERANCES, distance

    sizes = TINY if options.dry else {}
    found = stack(batch, dtype, options.device, groups=groups, **sizes)
    expected = found.in_float64()
    outputs = []
    for name, layers in (("fused", found), ("reference", expected)):
        with ours.backend(name):
            outputs.append(torch.stack([layers.step() for _ in range(3)]))
    kept = ([t for own in layers.states for t in own] for layers in (found, expected))
    pairs = zip(*kept, strict=True)
    far = max(distance(a, b) for a, b in (outputs, *pairs))
    right = far <= TOLERANCES[dtype][0] * (30 if options.dry else 2)
    row = {"case": f"layers' step, batch {batch}, {groups} groups", "dtype": str(dtype)[6:]}
    return row | {"against": "reference", "output": finite(far), "right": right}


def launches(layers: Stack) -> list[Callable[[], object]]:
    """The recurrence of every layer."""
    made = {"dtype": layers.weights.in_weight.dtype, "device": layers.h.device}
    projected = torch.randn(len(layers.h), len(layers.weights.in_weight), **made)
    return [partial(fused.mix, projected, *own, layers.weights.mixer) for own in layers.states]


def tiles(batch: int, heads: int) -> list[Tile]:
    """The present tile, then those to try."""
    today = fused.tile(batch * heads)
    return [today, *(tile for tile in TILES if tile != today)]


def tasks(device: str) -> list[tuple[str, Callable[[], object]]]:
    """Tasks for stage `precompile`: the recurrence with every tile."""

    def task(tile: Tile, batch: int) -> Callable[[], object]:
        def call() -> None:
            with patch.object(fused, "tile", lambda heads: tile):
                launches(stack(batch, torch.bfloat16, device, 1))[0]()

        return call

    return [(f"{tile}, batch {batch}", task(tile, batch)) for batch in (64, 1) for tile in TILES]


def run(job: str, options: Options) -> None:
    for batch in BATCHES[: 1 if options.dry else None]:
        count = 1 if options.dry else max(24, 96 // batch)  # larger than the card's cache
        layers = stack(batch, torch.bfloat16, options.device, count, **TINY if options.dry else {})
        times: dict[Tile, float] = {}
        for tile in tiles(batch, layers.weights.mixer.sizes.heads)[: 2 if options.dry else None]:
            row = {"batch": batch, "tile": list(tile)}
            try:
                with patch.object(fused, "tile", lambda heads, tile=tile: tile):
                    times[tile] = seconds(launches(layers), options.device, 0.02)
            except Exception as error:
                options.write("sweep-layers", **row, failed=reason(error))
                continue
            options.write("sweep-layers", **row, seconds=times[tile])
        today = next(iter(times.values()), 0.0)
        for tile in sorted(times, key=times.get)[:4]:
            line = f"batch {batch}: {tile}  # {times[tile] * 1e6:.1f} us"
            options.write("sweep-layers", line=line, today=today)
