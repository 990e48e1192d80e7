"""Stage `sweep`: find the fastest launch configuration for each line of the launch table.

It prints the fastest as lines for `TABLE` in kernels/ysnake_kernels/ssd/fused_plan.py.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import ysnake_kernels as ours
from torch import Tensor
from ysnake_kernels import triton_products
from ysnake_kernels.ssd import fused_plan
from ysnake_kernels.ssd.fused_plan import Config

from benchmarks.gpu import cases
from benchmarks.gpu.cases import arguments
from benchmarks.gpu.common import Options, capture_stream, reason, seconds
from benchmarks.traffic import Shape

USUAL = (Shape(), Shape(1, 32768), replace(Shape(), state=64), Shape(64, 512))
WIDE = (replace(Shape(), state=256),)


@dataclass(frozen=True)
class Entry:
    """A key of the launch table, and configurations to try besides the present one.

    A configuration may be a dictionary with several keys. These then change together.
    """

    key: tuple
    pass_: str
    """The pass to time: forward or backward."""
    configs: tuple[Config | dict[tuple, Config], ...]
    shapes: tuple[Shape, ...] = USUAL


def config(tile: int, p_slice: int, warps: int, stages: int, chunk: int = 0) -> Config:
    return Config(tile, p_slice, warps, stages, chunk)


def chunks_of(tokens: int, *halves: Config) -> dict[tuple, Config]:
    """Lines for states, rows and columns of the backward, with chunks of this many tokens."""
    states = config(min(64, tokens), 64, 4, 2, tokens)
    kinds = zip(("states", "rows", "columns"), (states, *halves), strict=True)
    return {(kind, 2, "usual"): line for kind, line in kinds}


ENTRIES = [
    Entry(
        ("forward", 2, "usual"),
        "forward",
        (
            *(config(32, 64, 4, stages) for stages in (1, 2, 3, 4)),
            *(config(64, 64, 4, stages) for stages in (1, 2)),
            config(64, 64, 8, 2),
            config(32, 64, 8, 2),
            *(config(tile, 32, 4, 3) for tile in (32, 64)),
        ),
    ),
    Entry(
        ("states", 2, "usual"),
        "backward",
        (
            *(config(32, 64, 4, stages, 64) for stages in (2, 3)),
            *(config(64, 64, 4, stages, 64) for stages in (1, 2, 3)),
            *(config(64, 64, 8, stages, 64) for stages in (2, 3)),
            config(64, 32, 4, 3, 64),
        ),
    ),
    Entry(
        ("rows", 2, "usual"),
        "backward",
        (
            *(config(64, 64, 8, stages) for stages in (1, 2, 3)),
            *(config(64, 64, 4, stages) for stages in (1, 2)),
            *(config(32, 64, 4, stages) for stages in (1, 2)),
        ),
    ),
    Entry(
        ("columns", 2, "usual"),
        "backward",
        (
            *(config(32, 64, 4, stages) for stages in (1, 2, 3)),
            *(config(64, 64, 8, stages) for stages in (1, 2)),
            *(config(64, 64, 4, stages) for stages in (1, 2)),
            config(32, 32, 4, 2),
        ),
    ),
    Entry(
        ("states", 2, "usual"),
        "backward",
        (
            chunks_of(128, config(64, 64, 8, 1), config(32, 64, 8, 1)),
            chunks_of(128, config(32, 64, 8, 2), config(32, 64, 8, 2)),
            chunks_of(32, config(32, 64, 4, 2), config(32, 64, 4, 2)),
        ),
    ),
    Entry(("forward", 2, "wide"), "forward", (config(32, 32, 8, 2), config(32, 64, 8, 2)), WIDE),
    Entry(("states", 2, "wide"), "backward", (config(64, 64, 8, 2, 64),), WIDE),
    Entry(("rows", 2, "wide"), "backward", (config(16, 32, 8, 1), config(32, 64, 8, 1)), WIDE),
    Entry(("columns", 2, "wide"), "backward", (config(16, 32, 8, 1), config(32, 64, 8, 1)), WIDE),
]


def shapes(entry: Entry, dry: bool) -> tuple[Shape, ...]:
    return (Shape(1, 40, heads=2, head_dim=16, state=16),) if dry else entry.shapes


def lines(entry: Entry, candidate: Config | dict) -> dict[tuple, Config]:
    """The lines of the table that a candidate replaces, by the keys of this machine."""
    given = candidate if isinstance(candidate, dict) else {entry.key: candidate}
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, _ = triton_products.family_and_processors(place)
    return {fused_plan.table_key(*key, family): config for key, config in given.items()}


@contextmanager
def using(table: dict[tuple, Config]) -> Iterator[None]:
    """Use these lines of the table within the block. Caches are cleared before and after."""
    with patch.dict(fused_plan.TABLE, table):
        forget()
        yield
    forget()


def forget() -> None:
    """Clear every cache of the scan's modules."""
    modules = [m for name, m in sys.modules.items() if name.startswith("ysnake_kernels.ssd.")]
    for module in modules:
        for value in vars(module).values():
            if callable(getattr(value, "cache_clear", None)):
                value.cache_clear()


class Work:
    """The scan of a shape. Its forward and its backward can run alone."""

    def __init__(self, s: Shape, device: str):
        given = arguments(s, torch.bfloat16, device)["scan"]
        self.leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
        self.dy = torch.randn_like(given["x"])
        self.device = device

    def scan(self) -> Tensor:
        with ours.backend("fused"):
            return ours.ssd_scan(**self.leaves, **cases.OPTIONS["scan"])

    def call(self, pass_: str) -> Callable[[], list[Tensor]]:
        if pass_ == "forward":

            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [self.scan()]

            return forward
        leaves = list(self.leaves.values())
        if self.device == "cpu":
            y = self.scan()
        else:
            torch.cuda.synchronize()
            with torch.cuda.stream(capture_stream()):
                y = self.scan()
            torch.cuda.synchronize()
        return lambda: list(torch.autograd.grad(y, leaves, self.dy, retain_graph=True))


def candidates(entry: Entry) -> list[dict[tuple, Config]]:
    """The present lines, then those to try."""
    keys = [key for candidate in entry.configs for key in lines(entry, candidate)]
    today = {key: fused_plan.TABLE[key] for key in keys if key in fused_plan.TABLE}
    others = [lines(entry, candidate) for candidate in entry.configs]
    return [today, *(c for c in others if today | c != today)]


def tasks(device: str) -> list[tuple[str, Callable[[], object]]]:
    """Tasks for stage `precompile`: every configuration on every shape, once.

    Keys of the table depend on the card. The parent process must not use the card, so each task
    looks its keys up itself.
    """

    def task(entry: Entry, number: int, s: Shape) -> Callable[[], object]:
        def call() -> None:
            for table in candidates(entry)[number : number + 1]:
                with using(table):
                    Work(s, device).call(entry.pass_)()

        return call

    return [
        (f"{entry.key}, {number}, {s.batch} x {s.length}", task(entry, number, s))
        for s in (*USUAL, *WIDE)
        for entry in ENTRIES
        if s in entry.shapes
        for number in range(1, len(entry.configs) + 1)
    ]


def run(job: str, options: Options) -> None:
    from comparison import distance

    for entry in ENTRIES[:1] if options.dry else ENTRIES:
        times: dict[int, list[float]] = {}
        tables = candidates(entry)[: 2 if options.dry else None]
        for s in shapes(entry, options.dry):
            work = Work(s, options.device)
            expected: list[Tensor] = []
            for i, table in enumerate(tables):
                row = {"key": list(entry.key), "config": [list(c) for c in table.values()]}
                row |= {"batch": s.batch, "length": s.length, "state": s.state}
                try:
                    with using(table):
                        call = work.call(entry.pass_)
                        found = call()
                        far = max(map(distance, found, expected)) if expected else 0.0
                        expected = expected or found
                        row |= {"distance": far if math.isfinite(far) else 1e300}
                        row["seconds"] = seconds([call], options.device, 0.05)
                except Exception as error:
                    options.write("sweep", **row, failed=reason(error))
                    continue
                options.write("sweep", **row)
                times.setdefault(i, []).append(row["seconds"] if far < 0.02 else math.inf)
        report(entry, tables, times, options)


def report(entry: Entry, tables: list[dict], times: dict[int, list[float]], options: Options):
    """Write the three best configurations, by the geometric mean of their times over shapes."""
    today = times.get(0)
    whole = {i: t for i, t in times.items() if today and len(t) == len(today)}
    if not whole:
        return
    ratios = {
        i: math.exp(sum(math.log(a / b) for a, b in zip(t, today, strict=True)) / len(t))
        if all(map(math.isfinite, t))
        else math.inf
        for i, t in whole.items()
    }
    for i in sorted(ratios, key=ratios.get)[:3]:
        for key, c in tables[i].items():
            default = c._field_defaults
            named = [f"{k}={v}" for k, v in c._asdict().items() if v != default.get(k)]
            text = ", ".join(named)
            line = f"{key}: Config({text}),".replace("'", '"')
            options.write("sweep", line=f"{line}  # {ratios[i]:.3f} of today's time")
