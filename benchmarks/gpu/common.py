"""What all stages share: options, rows of results, use of the card, and timing by CUDA graphs."""

import fcntl
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NO_CARD = "no CUDA device here"
PEAK = 989e12
"""Dense bfloat16 operations per second of an H100 or H200, by the data sheet."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    out: Path
    dry: bool = False
    peers: Path | None = None
    """A folder with mamba_ssm and causal_conv1d, where they are not installed."""
    processes: int = 16
    only: str = ""
    """Run only jobs whose name contains this text."""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def write(self, stage: str, **row: Any) -> None:
        """Append a row to gpu.jsonl at once, and print it."""
        line = json.dumps({"stage": stage, **row}) + "\n"
        with open(self.out / "gpu.jsonl", "a") as file:
            file.write(line)
        print(compact(stage, row), flush=True)


def compact(stage: str, row: dict) -> str:
    """A row as one short line of output."""
    values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
    return f"{stage}: " + " ".join(values)[:200]


def reason(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]} {lines[-1] if len(lines) > 1 else ''}"[:400].strip()


def multiprocessors(device: str) -> int:
    import torch

    return 1 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count


def synchronize(device: str) -> None:
    """Wait until the device has finished all launches."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def card_alone() -> Iterator[None]:
    """Have the card alone: other processes of this benchmark wait meanwhile."""
    with open(Path(tempfile.gettempdir()) / f"ysnake-gpu-{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Timing


def seconds(calls: Sequence[Callable[[], object]], device: str, budget: float = 0.1) -> float:
    """The median time of one call. A CUDA graph that makes all calls in turn is replayed.

    The calls should do the same work on different tensors, so that no call finds its tensors in
    the cache; see `copies`. On a CPU the result is the wall-clock time of one call.
    """
    import torch

    if device == "cpu":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start

    def work() -> None:
        for call in calls:
            call()

    replay = captured(work).replay
    replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    repeats = min(100, max(5, int(budget / once)))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in pairs]
    return statistics.median(times) / 1e3 / len(calls)


@cache
def capture_stream() -> Any:
    """The stream of all captures. Run a forward on it too, since its backward runs there."""
    import torch

    return torch.cuda.Stream()


def captured(work: Callable[[], object], warm_up: int = 2) -> Any:
    """A CUDA graph of the work. The work runs a few times before, to compile its kernels."""
    import torch

    stream = capture_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def copies(bytes_of_one: float, device: str, most: int = 64) -> int:
    """How many sets of tensors are together twice as large as the cache of the card."""
    if device == "cpu":
        return 1
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(most, max(1, math.ceil(2 * cache / bytes_of_one)))


def copy_bandwidth(device: str) -> float:
    """Bytes per second that torch.neg reads and writes. copy_ is slower in a graph."""
    import torch

    source = torch.randn(2**18 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: torch.neg(source, out=target)], device)
