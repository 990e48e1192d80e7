"""The fused backward, in five launches (six where the sequences are cut into segments).

1. Step sizes and cumulative decays, as in the forward.
2. A light sweep in both directions. It stores the state S that enters each chunk and the gradient
   dS' of the state that leaves it. From there on all tiles are independent. In segments there is a
   launch before it, for the states at the ends of the segments.
3. Rows: a program owns one tile and some heads of a group. It computes dC and the tile's part of dB
   inside the chunk.
4. Columns: a program owns one tile and some heads of a group. It computes dx, dB and dD.
   Rows and columns add the heads' shares of dC and dB before they write them.
5. Steps: what passes through each token becomes the gradients of dt and A.

There are no atomics, so the results are deterministic.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import ceil_divide
from ysnake_kernels.ssd import fused_tiles as ft
from ysnake_kernels.ssd.fused_backward_kernels import columns_kernel, rows_kernel, steps_kernel
from ysnake_kernels.ssd.fused_forward import compute_decays, heads_at_once, states_kernel
from ysnake_kernels.ssd.fused_plan import (
    Config,
    Constants,
    configured,
    constants,
    in_chunks,
    in_tiles,
    line_of,
    segments,
    side_by_side,
    slots,
    strides,
    token_stride,
)
from ysnake_kernels.ssd.inputs import ScanGradients, ScanInputs, SequenceGradients
from ysnake_kernels.triton_launch import Launcher, launcher
from ysnake_kernels.triton_products import family_and_processors

CONTIGUOUS = torch.contiguous_format


class Plan(NamedTuple):
    """How the kernels share the work of a backward pass."""

    states: tuple[Constants, Config]  # of states_kernel
    rows: tuple[Constants, Config]
    columns: tuple[Constants, Config]
    chunks: int  # of all sequences
    segments: int  # of a sequence
    slices: int  # of a head's channels in states_kernel
    splits: int  # programs among which the heads of a group are shared

    @property
    def row_tiles(self) -> int:
        K, _ = self.rows
        return self.chunks * (K.CHUNK // K.Q)

    @property
    def column_tiles(self) -> int:
        K, _ = self.columns
        return self.chunks * (K.CHUNK // K.Q)


def plan_backward(inputs: ScanInputs, unit: int) -> Plan:
    """The plan for this device; `unit` is that of the strides."""
    batch, length, heads, _ = inputs.x.shape
    groups = inputs.B.shape[2]
    family, multiprocessors = family_and_processors(inputs.x.device)
    K = constants(inputs, unit, family)
    config = line_of("states", family, K)
    chunk = config.chunk
    states = in_chunks(K, config, chunk), config
    rows, columns = (configured(kind, family, K, chunk) for kind in ("rows", "columns"))
    sequences = inputs.sequences
    chunks = slots(sequences, batch, length, inputs.cu_seqlens is not None, chunk)
    slices = K.P2 // states[0].PS
    count = segments(sequences, 2 * heads, slices, batch * length, multiprocessors)
    tiles = chunks * (chunk // rows[0].Q + chunk // columns[0].Q)
    splits = splits_of_group(tiles * groups, heads // groups, multiprocessors)
    return Plan(states, rows, columns, chunks, count, slices, splits)


def splits_of_group(programs: int, per_group: int, multiprocessors: int) -> int:
    """Among how many programs the heads of a group are shared.

    No more than fill the GPU, since each program writes its own dB and dC.
    """
    divisors = (d for d in range(1, per_group + 1) if per_group % d == 0)
    return next((d for d in divisors if programs * d >= 2 * multiprocessors), per_group)


class Work(NamedTuple):
    """What all launches of a backward pass are given."""

    plan: Plan
    inputs: ScanInputs  # the numbers of a token of x, dt, B and C lie side by side
    G: Tensor  # the gradient of y before the gate
    numbers: Tensor  # of each token and head, the rows that fused_tiles names
    sizes: tuple[int, int, int]  # tokens of a row of the batch and of a row of numbers, sequences
    tokens: list[int]  # strides of the tokens of x, B, C, G, dx, dB and dC, in units
    empty: Callable[..., Tensor]  # torch.empty on the device, in the dtype of sums and exponents


def backward(
    dy: Tensor, dfinal: Tensor | None, inputs: ScanInputs, into: SequenceGradients | None = None
) -> ScanGradients:
    """The gradients of the inputs.

    Args:
        dy: the gradient of y, contiguous or not.
        dfinal: the gradient of the final states, contiguous; None means zeros.
        inputs: those of `forward`.
        into: memory for the gradients of x, dt, B and C. If None, they are new tensors.
    """
    z, exact = inputs.z, inputs.accumulator
    if z is None:
        return _ungated(dy, dfinal, None, inputs, into)
    # The kernels start from G, the gradient before the gate. The gate's gradient needs y before it.
    G = (dy.to(exact) * F.silu(z.to(exact))).to(dy.dtype)
    y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    gradients = _ungated(G, dfinal, y, inputs, into)
    dz = torch.ops.aten.silu_backward(dy.to(exact) * y.to(exact), z.to(exact)).to(z.dtype)
    return gradients._replace(z=dz)


def _ungated(
    G: Tensor,
    dfinal: Tensor | None,
    y: Tensor | None,
    inputs: ScanInputs,
    into: SequenceGradients | None,
) -> ScanGradients:
    """`backward` of a scan without a gate, from the gradient G of its y. Writes y, if given."""
    x, dt, B, C, G = (side_by_side(t) for t in (inputs.x, inputs.dt, inputs.B, inputs.C, G))
    inputs = ScanInputs(x, dt, inputs.A, B, C, *inputs[5:])
    if into is None:
        into = SequenceGradients(
            *(torch.empty_like(t, memory_format=CONTIGUOUS) for t in (x, dt, B, C))
        )
    unit, tokens = strides(x, B, C, G, into.dx, into.dB, into.dC)
    plan = plan_backward(inputs, unit)
    K, _ = plan.rows
    with torch.cuda.device_of(x):
        numbers, padded = compute_decays(inputs, K, K.CHUNK, ft.BACKWARD_ROWS)
        sizes = (x.shape[1], padded, inputs.sequences)
        empty = partial(torch.empty, dtype=numbers.dtype, device=x.device)
        work = Work(plan, inputs, G, numbers, sizes, tokens, empty)
        states, dstates, dinitial = _launch_states(work, dfinal)
        dD, through = _launch_tiles(work, states, dstates, into, y)
        dA, ddt_bias = _launch_steps(work, through, into.ddt)
    return ScanGradients(into.dx, into.ddt, dA, into.dB, into.dC, dD, None, dinitial, ddt_bias)


def _launch(kernel: Any, planned: tuple[Constants, Config], *more: int) -> Launcher:
    K, config = planned
    return launcher(kernel, (K, *more), config.warps, config.stages)


def _launch_states(work: Work, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """S and dS' of all chunks, and the gradient of the initial states."""
    plan, inputs = work.plan, work.inputs
    (K, _), count, sequences = plan.states, plan.segments, work.sizes[2]
    state = (K.HEADS, K.P, K.N)
    factors = torch.bfloat16 if tl.bfloat16 == K.DOT else work.numbers.dtype
    states, dstates = (work.empty(plan.chunks, *state, dtype=factors) for _ in range(2))
    initial = inputs.initial_states
    dinitial = None if initial is None else torch.empty_like(initial)
    ends = dends = whole = None
    if count > 1:
        ends, dends = (work.empty(sequences, count, *state) for _ in range(2))
        whole = work.empty(sequences, count, K.HEADS)
    launch = _launch(states_kernel, plan.states, count, ft.BACKWARD_ROWS)
    tensors = (inputs.x, inputs.B, inputs.C, work.G, work.numbers, initial, dfinal)
    where = (inputs.seq_idx, inputs.cu_seqlens)
    stored = [(states, dstates)] if count == 1 else [(None, None), (states, dstates)]
    for pair in stored:  # in segments: first the ends of these, then the states
        launch(
            (2 * sequences * count * K.HEADS * plan.slices,),
            (*tensors, *where, dinitial, ends, dends, whole, *pair),
            (*work.tokens[:4], *work.sizes),
        )
    return states, dstates, dinitial


def _launch_tiles(
    work: Work, states: Tensor, dstates: Tensor, into: SequenceGradients, y: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Write dx, dB, dC and y; return dD, and the flow through each chunk."""
    plan, inputs, splits = work.plan, work.inputs, work.plan.splits
    (K, _), (length, _, _) = plan.rows, work.sizes
    batch, groups = inputs.x.shape[0], K.HEADS // K.PER_GROUP
    through = work.empty(plan.chunks, K.HEADS)
    dB_within = work.empty(K.CHUNK // K.Q, batch * length, splits * groups, K.N)
    D = inputs.D
    dD = None if D is None else work.empty(plan.column_tiles, *D.shape)
    dB, dC, tokens = into.dB, into.dC, work.tokens
    if splits > 1:  # each share of a group's heads has its own
        dB, dC = (work.empty(batch, length, splits * groups, K.N) for _ in range(2))
        tokens = [*tokens[:5], *[splits * groups * K.N // K.UNIT] * 2]
    # shares of a group, heads of a share, tokens
    shares = splits, K.PER_GROUP // splits, batch * length
    where = (inputs.seq_idx, inputs.cu_seqlens)
    read = (inputs.x, inputs.B, inputs.C, D, work.G, work.numbers, *where, states)
    _launch(rows_kernel, plan.rows)(
        (plan.row_tiles * groups * splits,),
        (*read, dC, dB_within, y),
        (*tokens[:4], tokens[6], *work.sizes, *shares),
    )
    _launch(columns_kernel, plan.columns, K.Q)(
        (plan.column_tiles * groups * splits,),
        (*read, dstates, dB_within, into.dx, dB, dD, through),
        (*tokens[:6], *work.sizes, *shares),
    )
    if splits > 1:
        for total, parts in ((into.dB, dB), (into.dC, dC)):
            total.copy_(parts.unflatten(2, (splits, groups)).sum(2))
    return None if D is None or dD is None else dD.sum(0).to(D.dtype), through


def _launch_steps(work: Work, through: Tensor, ddt: Tensor) -> tuple[Tensor, Tensor | None]:
    """Write ddt; return the gradients of A and dt_bias."""
    plan, inputs = work.plan, work.inputs
    K, _ = plan.rows
    sums = work.empty(2, plan.chunks, K.HEADS)
    at_once = heads_at_once(K.HEADS)
    launcher(steps_kernel, (in_tiles(K, 0, K.CHUNK, 0), at_once))(
        (plan.chunks * ceil_divide(K.HEADS, at_once),),
        (inputs.dt, inputs.A, inputs.dt_bias, work.numbers, inputs.cu_seqlens, ddt, through, *sums),
        (token_stride(inputs.dt), token_stride(ddt), *work.sizes),
    )
    bias = inputs.dt_bias
    ddt_bias = None if bias is None else sums[1].sum(0).to(bias.dtype)
    return sums[0].sum(0).to(inputs.A.dtype), ddt_bias
