"""The fused forward: one body that walks the tiles of a sequence with the state in registers.

With few heads and a long sequence it runs per segment, from a state that it combines from the ends
of the segments before; a light sweep, which the backward also uses, computes those ends first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.ssd.fused_tiles import (
    DECAY,
    STEP,
    arithmetic,
    combine,
    constants,
    decays,
    device,
    dot,
    launch,
    load_state,
    load_tile,
    segment,
    segments,
    sequence,
    sigmoid,
    slot_of,
    step_sizes,
    store_plane,
    store_state,
    store_tile,
    view,
)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial_states, y, final_states, ends, whole,
    seq_idx, cu_seqlens, length, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, D_PER_CHANNEL: tl.constexpr, SEGMENTS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    Q: tl.constexpr, PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """A program owns one segment of a sequence, one head, one slice of its channels."""
    SLICES: tl.constexpr = P2 // PS
    pid = tl.program_id(0)
    head = pid // SLICES % heads
    seg = pid // (SLICES * heads) % SEGMENTS
    seq = pid // (SLICES * heads * SEGMENTS)
    group = head // per_group
    q, n = tl.arange(0, Q), tl.arange(0, N2)
    p = pid % SLICES * PS + tl.arange(0, PS)
    row, start, end = sequence(seq, length, cu_seqlens)
    first_tile, end_tile = segment(seg, start, end, SEGMENTS, Q)
    a = tl.load(A + head).to(ACC)

    S = tl.zeros([PS, N2], ACC)
    if initial_states is not None:
        S += load_state(initial_states, seq, head, heads, p, n, P, N).to(ACC)
    if SEGMENTS > 1:
        S = combine(S, ends, whole, seq * SEGMENTS, 0, seg, 1, head, heads, p, n, P, N)

    for tile in range(first_tile, end_tile):
        t0 = start + tile * Q
        x_ = load_tile(x, row, t0, head, q, end, p, P)  # [Q, PS]
        B_ = load_tile(B, row, t0, group, q, end, n, N)  # [Q, N2]
        C_ = load_tile(C, row, t0, group, q, end, n, N)  # [Q, N2]
        step, _ = step_sizes(dt, dt_bias, row, t0, head, q, end, ACC, SOFTPLUS, LOW, HIGH)
        cs, entry, exit, through, doc = decays(step * a, seq_idx, row, length, t0, q, start, end, Q)
        seen = (q[:, None] <= q[None, :]) & (doc[:, None] == doc[None, :])  # [j, i], j <= i
        L = tl.exp(tl.where(seen, cs[None, :] - cs[:, None], float("-inf")))
        W = dot(B_, tl.trans(C_), DOT, PRECISION) * L * step[:, None]  # [j, i]
        out = dot(S, tl.trans(C_), DOT, PRECISION) * entry[None, :]  # [PS, Q]
        out += dot(tl.trans(x_), W, DOT, PRECISION)
        weighted = x_.to(ACC) * (step * exit)[:, None]
        S = S * through + dot(tl.trans(weighted), B_, DOT, PRECISION)

        out = tl.trans(out)  # [Q, PS]
        if D is not None:
            if D_PER_CHANNEL:
                out += x_.to(ACC) * tl.load(D + head * P + p, mask=p < P, other=0.0).to(ACC)
            else:
                out += x_.to(ACC) * tl.load(D + head).to(ACC)
        if z is not None:
            z_ = load_tile(z, row, t0, head, q, end, p, P).to(ACC)
            out *= z_ * sigmoid(z_)
        store_tile(y, row, t0, head, q, end, p, out, P)

    if seg == SEGMENTS - 1:
        store_state(S, final_states, seq, head, heads, p, n, P, N)


@triton.jit
def sweep(
    S, v, gate, B, dt, dt_bias, a, tiles, scratch, seq_idx, length, batch,
    row, start, end, first_tile, end_tile, slot, head, group, heads, p, n,
    P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    Q: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry a state over tiles: forward S with x and B; in reverse its gradient with dy and C.

    Stores in `tiles` the state that enters each chunk, or the gradient of the one that leaves it;
    and forward the step sizes and the log decays from the chunk's start.
    """
    TILES: tl.constexpr = CHUNK // Q
    q = tl.arange(0, Q)
    whole = tl.full([], 1.0, ACC)
    before = tl.full([], 0.0, ACC)  # log decay from the chunk's start to the tile
    for k in range(first_tile, end_tile):
        tile = first_tile + end_tile - 1 - k if REVERSE else k
        t0 = start + tile * Q
        if tiles is not None:
            edge = (tile + 1) % TILES == 0 or t0 + Q >= end if REVERSE else tile % TILES == 0
            if edge:
                store_state(S, tiles, slot + tile // TILES, head, heads, p, n, P, N)
                before *= 0.0
        v_ = load_tile(v, row, t0, head, q, end, p, P).to(ACC)  # [Q, PS]
        B_ = load_tile(B, row, t0, group, q, end, n, N)  # [Q, N2]
        step, _ = step_sizes(dt, dt_bias, row, t0, head, q, end, ACC, SOFTPLUS, LOW, HIGH)
        decay, entry, exit, through, _ = decays(
            step * a, seq_idx, row, length, t0, q, start, end, Q
        )
        if REVERSE:
            v_ *= entry[:, None]
            if gate is not None:
                z_ = load_tile(gate, row, t0, head, q, end, p, P).to(ACC)
                v_ *= z_ * sigmoid(z_)
        else:
            v_ *= (step * exit)[:, None]
            if tiles is not None:
                t = t0 + q
                store_plane(step, scratch, STEP, row, batch, head, heads, length, t, end)
                decay += before
                store_plane(decay, scratch, DECAY, row, batch, head, heads, length, t, end)
                before = tl.sum(tl.where(q == Q - 1, decay, 0.0), 0)
        S = S * through + dot(tl.trans(v_), B_, DOT, PRECISION)
        whole *= through
    return S, whole


@triton.jit(do_not_specialize=["length", "slots"])
def states_kernel(
    x, dt, A, B, C, z, dt_bias, dy, initial_states, dfinal, dinitial, ends, whole, tiles, scratch,
    seq_idx, cu_seqlens, length, slots, heads, per_group, sequences, batch,
    P: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    Q: tl.constexpr, CHUNK: tl.constexpr, PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """A program owns what a program of `forward_kernel` owns, in one of two directions.

    Without `tiles`: each segment's end from a zero state, and its whole decay. With `tiles`: the
    states between all chunks, from `ends` where there is more than one segment.
    """
    SLICES: tl.constexpr = P2 // PS
    TILES: tl.constexpr = CHUNK // Q
    pid = tl.program_id(0)
    head = pid // SLICES % heads
    seg = pid // (SLICES * heads) % SEGMENTS
    seq = pid // (SLICES * heads * SEGMENTS) % sequences
    reverse = pid // (SLICES * heads * SEGMENTS * sequences)
    group = head // per_group
    n = tl.arange(0, N2)
    p = pid % SLICES * PS + tl.arange(0, PS)
    row, start, end = sequence(seq, length, cu_seqlens)
    first, stop = segment(seg, start, end, SEGMENTS, CHUNK)
    first_tile, end_tile = first * TILES, tl.minimum(stop * TILES, tl.cdiv(end - start, Q))
    a = tl.load(A + head).to(ACC)
    slot = slot_of(seq, start, length, cu_seqlens, CHUNK)
    index = seq * SEGMENTS + seg

    S = tl.zeros([PS, N2], ACC)
    if reverse == 0:
        if tiles is not None:
            if initial_states is not None:
                S += load_state(initial_states, seq, head, heads, p, n, P, N).to(ACC)
            if SEGMENTS > 1:
                S = combine(S, ends, whole, index - seg, 0, seg, 1, head, heads, p, n, P, N)
        S, decay = sweep(
            S, x, None, B, dt, dt_bias, a, tiles, scratch, seq_idx, length, batch,
            row, start, end, first_tile, end_tile, slot, head, group, heads, p, n,
            P, N, False, ACC, DOT, PRECISION, SOFTPLUS, LOW, HIGH, Q, CHUNK,
        )  # fmt: skip
        if tiles is None:
            store_state(S, ends, index, head, heads, p, n, P, N)
            if pid % SLICES == 0:
                tl.store(whole + index * heads + head, decay)
    elif dy is not None:
        behind = sequences * SEGMENTS
        if tiles is not None:
            if dfinal is not None:
                S += load_state(dfinal, seq, head, heads, p, n, P, N).to(ACC)
            if SEGMENTS > 1:
                last = index - seg + SEGMENTS - 1
                count = SEGMENTS - 1 - seg
                S = combine(S, ends, whole, last, behind, count, -1, head, heads, p, n, P, N)
        S, _ = sweep(
            S, dy, z, C, dt, dt_bias, a, tiles, scratch, seq_idx, length, batch,
            row, start, end, first_tile, end_tile, slots + slot, head, group, heads, p, n,
            P, N, True, ACC, DOT, PRECISION, SOFTPLUS, LOW, HIGH, Q, CHUNK,
        )  # fmt: skip
        if tiles is None:
            store_state(S, ends, behind + index, head, heads, p, n, P, N)
        elif dinitial is not None and seg == 0:
            store_state(S, dinitial, seq, head, heads, p, n, P, N)


def forward(
    x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens,
    softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the final states. One launch, or two where the sequences are cut into segments."""
    batch, length, heads, P = x.shape
    N = B.shape[3]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    numbers = arithmetic(x, B, C, dt, A, D, z, initial_states, dt_bias)
    given = constants(x, B, numbers, softplus, low, high)
    family, multiprocessors = device(x)
    config = launch("forward", family, given)
    del config["CHUNK"]
    slices = given["P2"] // config["PS"]
    count = segments(sequences, heads, slices, length, multiprocessors)
    given["SEGMENTS"] = count
    exact = torch.float64 if given["ACC"] == tl.float64 else torch.float32

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_states = torch.empty(sequences, heads, P, N, dtype=exact, device=x.device)
    ends = whole = None
    per_group = heads // B.shape[2]
    with torch.cuda.device_of(x):
        if count > 1:
            ends = torch.empty(sequences, count, heads, P, N, dtype=exact, device=x.device)
            whole = torch.empty(sequences, count, heads, dtype=exact, device=x.device)
            states_kernel[(sequences * count * heads * slices,)](
                view(x), view(dt), A, view(B), None, None, dt_bias, None, None, None, None,
                ends, whole, None, None, seq_idx, cu_seqlens, length, 0, heads, per_group,
                sequences, batch, CHUNK=config["Q"], **given, **config,
            )  # fmt: skip
        forward_kernel[(sequences * count * heads * slices,)](
            view(x), view(dt), A, view(B), view(C), D, view(z), dt_bias, initial_states,
            view(y), final_states, ends, whole, seq_idx, cu_seqlens, length, heads, per_group,
            D_PER_CHANNEL=D is not None and D.ndim == 2, **given, **config,
        )  # fmt: skip
    return y, final_states
