"""Stage `decode`: tokens per second when a model writes, with and without CUDA graphs.

A step must at least read every weight once, and read and write every state once. `share` is the
speed of this traffic, as a share of the speed of a plain copy.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.common import Options, card_alone, copy_bandwidth, reason, seconds, synchronize
from benchmarks.gpu.train import SIZES, ours
from ysnake.inference.decoding import Decoder
from ysnake.inference.replay import ReplayedStep
from ysnake.model import State


def run(job: str, options: Options) -> None:
    model, _ = ours(SIZES["dry" if options.dry else job])
    with card_alone():
        bandwidth = copy_bandwidth(options.device)
        for dtype in (torch.float32, torch.bfloat16)[options.dry :]:
            model = model.to(options.device, dtype).eval()
            for batch in (1,) if options.dry else (1, 16, 64):
                row = {"model": job, "dtype": str(dtype)[6:], "batch": batch}
                try:
                    measure(model, batch, row, bandwidth, options)
                except Exception as error:
                    options.write("decode", **row, failed=reason(error))


def step_of(model: torch.nn.Module, batch: int) -> tuple[Callable[[], None], Tensor, State]:
    """A step that writes the likeliest token of each row, the tokens, and the state."""
    decoder = Decoder(model)
    state = model.empty_state(batch)
    ids = torch.zeros(batch, dtype=torch.int64, device=model.backbone.embeddings.weight.device)

    @torch.no_grad()
    def step() -> None:
        logits, _ = decoder.step(ids, state)
        ids.copy_(logits.argmax(-1))

    return step, ids, state


def measure(
    model: torch.nn.Module, batch: int, row: dict, bandwidth: float, options: Options
) -> None:
    device = options.device
    step, ids, state = step_of(model, batch)
    one_by_one = ReplayedStep(model).write

    @torch.no_grad()
    def plain_step() -> None:
        ids.copy_(one_by_one(ids, state).argmax(-1))

    weights = sum(p.nbytes for p in model.parameters())
    states = sum(2 * t.nbytes for layer in state for t in (layer.conv, layer.ssm))

    def write(way: str, spent: float) -> None:
        more = {"way": way, "seconds": spent, "tokens per second": batch / spent}
        more |= {"bytes": weights + states, "share": (weights + states) / spent / bandwidth}
        options.write("decode", **row, **more)

    write("kernel by kernel", plain_seconds(plain_step, device))
    write("Decoder", plain_seconds(step, device))  # including the time of Python, as in a program
    if device == "cuda":
        write("graph", seconds([plain_step], device))


def plain_seconds(step: Callable[[], None], device: str, count: int = 20) -> float:
    """The wall-clock time of a step as a program sees it, with the time of Python."""
    step()
    step()
    count = 1 if device == "cpu" else count
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count
