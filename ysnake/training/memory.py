"""Predicting the memory that training takes on a CPU.

The prediction adds up the tensors that exist at the peak of a step: at the start of the backward
pass through the last layer. `python -m benchmarks.memory` compares it with measured peaks.
"""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ysnake.model.config import VOCAB_MULTIPLE, ModelConfig
from ysnake.shared import control_groups
from ysnake.shared.errors import InputError
from ysnake.shared.shown import amount
from ysnake.training.launch import processes, processes_here
from ysnake.training.options import Settings, parse_size
from ysnake.training.sharing import share

if TYPE_CHECKING:
    from rich.table import Table

FLOAT = 4  # bytes
PREDICTED_TOO_HIGH = 1.25  # a prediction is too high by at most this factor
LARGE_BATCH = 1024  # windows in a forward pass; --plan counts no further
PROCESS = 450e6  # bytes: Python, torch, its threads and buffers, and the tokens


@dataclass(frozen=True)
class Plan:
    """The predicted peak memory of a training process in bytes, and its parts."""

    parameters: int  # a number, not bytes
    weights: float  # with gradients and the moments of the optimizer
    kept: float  # what the forward pass stores for the backward pass
    working: float  # temporary tensors of a layer and of the loss
    process: float = PROCESS

    @property
    def peak(self) -> float:
        return self.weights + self.kept + self.working + self.process


def predict(config: ModelConfig, settings: Settings) -> Plan:
    """Predict the memory for training with these settings in one process on a CPU."""
    from ysnake_kernels.mixer.eager import CHUNK_ELEMENTS
    from ysnake_kernels.ssd.eager_layout import CPU_CHUNK

    from ysnake.model.loss import slice_rows

    c = config
    head = c.vocab_size * c.d_model
    projected = 2 * c.d_inner + 2 * c.n_groups * c.d_state + c.n_heads
    projections = c.d_model * (projected + c.d_inner)
    layer = projections + c.d_model + c.d_inner
    layer += c.d_conv * (c.conv_width + c.conv_bias) + 3 * c.n_heads
    untied = 0
    if c.output_size is not None:
        untied = c.output_size * (c.d_model + c.vocab_size)
    elif not c.tied:
        untied = head
    parameters = head + untied + c.n_layers * layer + c.d_model
    numbers = 4 * parameters  # each with its gradient and two moments
    if settings.optimizer == "muon":
        numbers -= c.n_layers * projections  # Muon has one moment

    batch_size, seq_len = settings.batch_size, settings.seq_len
    tokens = batch_size * seq_len
    stored: float = projected  # the input of the mixer
    if settings.precision == "bfloat16" and settings.context_parallel == 1:
        stored = projected / 2 + c.n_heads  # in bfloat16, and the step sizes in float32 too
    block = tokens * (c.d_model + stored)
    kept: float = c.n_layers * block
    if settings.recompute:  # the gradients take the memory of inputs that are freed
        kept = max(0, c.n_layers * tokens * c.d_model - parameters) + block
    if settings.carry_state:  # before the window and after it
        kept += 2 * c.n_layers * batch_size * (c.d_inner * c.d_state + c.d_conv * c.conv_width)

    # The backward pass of the mixer: all its gradients, and recomputed tensors of a group of rows.
    q = min(c.chunk_size or CPU_CHUNK, seq_len)
    rows = min(batch_size, max(1, CHUNK_ELEMENTS // (c.d_inner * q)))
    states = -(-seq_len // q) * rows * c.d_state * c.d_inner
    group = rows * seq_len * (3 * c.d_conv + 2 * c.d_inner) + states
    chunk = rows * q * (12 * c.d_inner + 4 * c.n_heads * q)
    working = tokens * (projected + 3 * c.d_model) + group + chunk
    logits = min(slice_rows(c.vocab_size, "cpu"), tokens) * c.vocab_size  # of a slice
    working += 2 * logits + head  # and the head's gradient
    return Plan(parameters, FLOAT * numbers, FLOAT * kept, FLOAT * working)


def largest_batch(config: ModelConfig, settings: Settings, limit: float) -> int:
    """The largest batch that takes at most `limit` bytes; 0 if a single window takes more."""
    size = 0
    for step in (1 << k for k in range(24, -1, -1)):
        if predict(config, replace(settings, batch_size=size + step)).peak <= limit:
            size += step
    return size


def choose_batch_size(settings: Settings, config: ModelConfig) -> None:
    """Set batch_size, accumulate and recompute so that a step stays below --memory.

    The number of windows in a step does not change.

    Raises:
        InputError: a single window takes more.
    """
    if settings.memory is None:
        return
    limit = parse_size(settings.memory)
    windows = settings.batch_size * settings.accumulate
    for recompute in sorted({settings.recompute, True}):
        largest = largest_batch(config, replace(settings, recompute=recompute), limit)
        if largest:
            size = max(n for n in range(1, min(largest, windows) + 1) if windows % n == 0)
            settings.batch_size, settings.accumulate = size, windows // size
            settings.recompute = recompute
            return
    least = predict(config, replace(settings, batch_size=1, recompute=True)).peak
    raise InputError(
        f"{limit / 1e9:.2f} GB are not enough, one window of {amount(settings.seq_len, 'token')} "
        f"takes {least / 1e9:.2f} GB; a shorter --seq-len or a smaller model takes less",
        field="--memory",
    )


def check(settings: Settings, config: ModelConfig, device: str) -> None:
    """Raise InputError if a step would take more memory than this machine has for each process.

    A GPU reports it at once, so there it is not checked. Nor is it with --shard.
    """
    limit = available()
    if device != "cpu" or limit is None or settings.shard:
        return
    windows, length = share(settings)
    own = replace(settings, batch_size=windows, seq_len=length)
    peak, here = predict(config, own).peak, processes_here()
    if here * peak <= PREDICTED_TOO_HIGH * limit:
        return
    fits = largest_batch(config, own, limit / here)
    remedy = "a shorter --seq-len or a smaller model takes less"
    if fits:
        fits *= -(-settings.batch_size // windows)  # of all processes
        remedy = f"--batch-size {fits} fits"
        if processes() == 1:
            remedy += "; or give --memory SIZE, which chooses the batch size"
    each = f" in each of {here} processes" if here > 1 else ""
    raise InputError(
        f"a batch with {amount(windows, 'window')} of {amount(length, 'token')} takes "
        f"{peak / 1e9:,.1f} GB{each}, and this machine has {limit / 1e9:.1f} GB; {remedy}",
        field="--batch-size",
    )


def available() -> float | None:
    """Bytes of memory of this machine or container; None if unknown."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = control_groups.memory_limit()
    if limit is not None:
        found.append(limit)
    return float(min(found)) if found else None


def table(config: ModelConfig, settings: Settings) -> "Table":
    """A table of the prediction for these settings, and of the largest batch that fits."""
    from rich.table import Table

    plan = predict(config, settings)
    out = Table(box=None, show_header=False, padding=(0, 2))
    out.add_column(justify="right")
    rows = {
        "weights, gradients, optimizer": plan.weights,
        "kept for the backward pass": plan.kept,
        "working memory of a step": plan.working,
        "Python and torch": plan.process,
        "[bold]predicted peak[/]": plan.peak,
    }
    out.add_row(f"{plan.parameters:,}", "parameters")
    out.add_row(
        f"{config.vocab_size:,}", f"vocabulary, rounded up to a multiple of {VOCAB_MULTIPLE}"
    )
    out.add_row(f"{settings.seq_len:,}", "--seq-len")
    out.add_row(f"{settings.batch_size:,}", "--batch-size")
    out.add_row(str(config.chunk_size or "automatic"), "--chunk-size")
    for name, size in rows.items():
        out.add_row(f"{size / 1e9:.2f} GB", name)
    limit = available() if settings.memory is None else parse_size(settings.memory)
    if limit is not None:
        where = "this machine" if settings.memory is None else "--memory"
        fits, more = (
            largest_batch(config, replace(settings, recompute=recompute), limit)
            for recompute in (settings.recompute, True)
        )
        out.add_row(f"{limit / 1e9:.2f} GB", where)
        out.add_row(
            _at_most(fits), f"largest --batch-size that fits, {_at_most(more)} with --recompute"
        )
    return out


def _at_most(batch_size: int) -> str:
    """A batch size in words, without a figure where it is larger than anybody needs."""
    return f"{batch_size:,}" if batch_size <= LARGE_BATCH else f"more than {LARGE_BATCH:,}"


def peak(device: str) -> int | None:
    """The peak memory so far in bytes, of the GPU or of this process; None if unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
