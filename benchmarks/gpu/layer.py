"""Stage `sweep-layer`: find the fastest tiles for one token through a layer.

It prints the fastest for the functions `project_tile`, `state_tile` and `join_tile` in
kernels/ysnake_kernels/layer_step/fused.py. Stage `check` compares its layers with the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import ysnake_kernels as ours
from torch import Tensor
from ysnake_kernels.layer_step import fused, layer_step
from ysnake_kernels.layer_step.fused import StateTile, Tile
from ysnake_kernels.layer_step.weights import LayerWeights
from ysnake_kernels.mixer import MixerSizes
from ysnake_kernels.mixer_step import MixerWeights

from benchmarks.gpu.cases import finite
from benchmarks.gpu.common import Options, reason, seconds

BATCHES = {torch.bfloat16: (1, 16, 64), torch.float32: (1, 64)}
TINY = {"d_model": 64, "state": 16}
LAYERS = 24  # more weights than the cache holds
MIXED = [StateTile(e, w) for e in (1024, 2048, 4096, 8192) for w in (2, 4, 8) if e <= 2048 * w]


def project_tiles(rows: int) -> list[Tile]:
    """Tiles to try for the input projection."""
    tiles = [Tile(rows, 16, depth, 4, stages) for depth in (64, 128) for stages in (3, 5)]
    tiles += [Tile(rows, 32, 64, 4, stages) for stages in (3, 5, 6)]
    tiles += [Tile(rows, 32, 128, warps, stages) for warps in (4, 8) for stages in (2, 3, 4)]
    tiles += [Tile(rows, 64, 64, 4, 4), Tile(rows, 16, 256, 4, 2), Tile(rows, 32, 256, 8, 2)]
    return tiles


def join_tiles(rows: int) -> list[Tile]:
    """Tiles to try for the output projection."""
    heights = sorted({16, min(rows, 32), rows})
    return [
        Tile(height, 16, depth, warps, stages)
        for height in heights
        for depth, stages in ((64, 4), (128, 3), (128, 5), (256, 3), (512, 2))
        for warps in (2, 4)
    ]


@dataclass
class Layer:
    """The arguments of `layer_step`, and what its kernels pass on."""

    h: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    weights: LayerWeights

    @property
    def projected(self) -> Tensor:
        """Memory for the input projection's output."""
        return self.conv_state.new_zeros(len(self.h), len(self.weights.in_weight))

    def step(self) -> None:
        layer_step(self.h, self.conv_state, self.ssm_state, self.weights)

    def converted(self, function: Callable[[Tensor], Tensor]) -> "Layer":
        """This layer with the function applied to each tensor, for example torch.clone."""

        def convert(t: object) -> object:
            return function(t) if isinstance(t, Tensor) else t

        w = self.weights
        mixer = MixerWeights(*map(convert, w.mixer))
        weights = LayerWeights(*(mixer if t is w.mixer else convert(t) for t in w))
        return Layer(*map(convert, (self.h, self.conv_state, self.ssm_state)), weights)


def layer(
    batch: int,
    dtype: torch.dtype,
    device: str,
    groups: int = 1,
    d_model: int = 768,
    state: int = 128,
) -> Layer:
    """A layer with random weights. Its residual stream is in float32, or float64 as `dtype`."""
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
    weights = LayerWeights(randn(d_model), 1e-5, into, None, mixer, out / 64, None)
    states = randn(batch, 3, channels).mT, randn(batch, sizes.heads, 64, state, dtype=exact)
    return Layer(randn(batch, d_model, dtype=exact), *states, weights)


def compare(batch: int, groups: int, dtype: torch.dtype, options: Options) -> dict:
    """Three tokens through the fused layer and through the reference in float64: a row."""
    from comparison import TOLERANCES, distance

    found = layer(batch, dtype, options.device, groups, **(TINY if options.dry else {}))
    expected = found.converted(Tensor.double)
    for name, one in (("fused", found), ("reference", expected)):
        with ours.backend(name):
            for _ in range(3):
                one.step()
    pairs = ((found.h, expected.h), (found.conv_state, expected.conv_state))
    far = max(distance(a, b) for a, b in (*pairs, (found.ssm_state, expected.ssm_state)))
    right = far <= TOLERANCES[dtype][0] * (30 if options.dry else 2)
    row = {"case": f"layer step, batch {batch}, {groups} groups", "dtype": str(dtype)[6:]}
    return row | {"against": "reference", "output": finite(far), "right": right}


def kernels(layers: list[Layer]) -> dict[str, Callable[[], list[Callable]]]:
    """For each kernel its launches, one for each layer."""
    one = layers[0]
    dtype = one.conv_state.dtype
    numbers = fused.numbers(one.h.device, dtype)
    projected = [each.projected for each in layers]
    pairs = list(zip(layers, projected, strict=True))

    def mixed() -> list[Callable]:
        return [
            partial(fused._mix, p, each.conv_state, each.ssm_state, each.weights)
            for each, p in pairs
        ]

    def joined() -> list[Callable]:
        y, squares = fused._mix(projected[0], one.conv_state, one.ssm_state, one.weights)
        return [
            partial(fused._join, each.h, y, squares, p, each.conv_state, each.weights, numbers)
            for each, p in pairs
        ]

    return {
        "project_tile": lambda: [
            partial(fused._project, each.h, p, each.weights, numbers) for each, p in pairs
        ],
        "state_tile": mixed,
        "join_tile": joined,
    }


def tiles(name: str, batch: int) -> list[Tile | StateTile]:
    """The present tile of a kernel, then those to try."""
    rows = min(64, max(16, batch))
    today = getattr(fused, name)(batch)
    others = {"project_tile": project_tiles(rows), "join_tile": join_tiles(rows)}.get(name, MIXED)
    return [today, *(tile for tile in others if tile != today)]


def tasks(device: str) -> list[tuple[str, Callable[[], object]]]:
    """Tasks for stage `precompile`: a layer with every tile."""

    def task(dtype: torch.dtype, batch: int, name: str, number: int) -> Callable[[], object]:
        def call() -> None:
            tile = tiles(name, batch)[number]
            with patch.object(fused, name, lambda *given: tile):
                for launch in kernels([layer(batch, dtype, device)])[name]():
                    launch()

        return call

    return [
        (f"{name}, {tile}, {batch}", task(dtype, batch, name, number))
        for dtype, batches in BATCHES.items()
        for batch in batches
        for name in ("project_tile", "state_tile", "join_tile")
        for number, tile in enumerate(tiles(name, batch))
    ]


def run(job: str, options: Options) -> None:
    for dtype, batches in BATCHES.items():
        for batch in batches[: 1 if options.dry else None]:
            one = layer(batch, dtype, options.device, **(TINY if options.dry else {}))
            layers = [one.converted(torch.clone) for _ in range(1 if options.dry else LAYERS)]
            for name, launches in kernels(layers).items():
                times = {}
                for tile in tiles(name, batch)[: 2 if options.dry else None]:
                    row = {"kernel": name, "batch": batch, "dtype": str(dtype)[6:], "tile": tile}
                    try:
                        with patch.object(fused, name, lambda *given, tile=tile: tile):
                            times[tile] = seconds(launches(), options.device, 0.02)
                    except Exception as error:
                        options.write("sweep-layer", **row, failed=reason(error))
                        continue
                    options.write("sweep-layer", **row, seconds=times[tile])
                today = next(iter(times.values()), 0.0)
                for tile in sorted(times, key=times.get)[:3]:
                    text = (
                        f"{name}({batch}), {str(dtype)[6:]}: {tile}  # {times[tile] * 1e6:.1f} us"
                    )
                    options.write("sweep-layer", line=text, today=today)
