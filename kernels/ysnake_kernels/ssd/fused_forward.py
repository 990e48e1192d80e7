"""The fused forward, in two launches (three where the sequences are cut into segments).

1. A small kernel turns dt into step sizes and cumulative decays.
2. In segments only: a light sweep computes the state in which each segment ends if it starts from
   zero. The backward uses this kernel too.
3. The forward kernel walks the chunks of a sequence, or of a segment, with the state in registers.
   In segments it first combines the ends of the segments before into the entering state.

A chunk of the forward is one tile.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import ceil_divide, next_power_of_2
from ysnake_kernels.ssd import fused_tiles as ft
from ysnake_kernels.ssd.fused_plan import (
    Constants,
    configured,
    constants,
    in_tiles,
    segments,
    side_by_side,
    slots,
    strides,
    token_stride,
)
from ysnake_kernels.ssd.fused_tiles import DECAY, SOURCE, STEP
from ysnake_kernels.ssd.inputs import ScanInputs
from ysnake_kernels.triton_launch import launcher
from ysnake_kernels.triton_math import silu
from ysnake_kernels.triton_products import family_and_processors


def heads_at_once(heads: int) -> int:
    """How many heads one program handles in kernels with little work for each head."""
    return min(16, next_power_of_2(heads))


@triton.jit(do_not_specialize=["dt_token", "length", "padded", "sequences"])
def decays_kernel(
    dt, A, dt_bias, cu_seqlens, rows, dt_token, length, padded, sequences, K,
    HEADS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Write DECAY, SOURCE and, if there is room, STEP. A program owns a chunk and HEADS heads.

    Log decays are cut at LOWEST and added up in float64. The sums stay so small that the
    difference of two sums is exact enough in float32.
    """
    place = ft.Place(None, cu_seqlens, sequences, length)
    blocks = tl.cdiv(K.HEADS, HEADS)
    chunk = ft.chunk_in(place, tl.program_id(0) // blocks, K.CHUNK)
    if chunk.t0 >= chunk.end:
        return
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    raw, bias, used = ft.load_dt(dt, dt_bias, dt_token, chunk, head, K)  # [Q, H]
    step, _ = ft.step_sizes(raw, bias, used, K)
    decay, _ = ft.log_decays(step, A, head, K)
    lowest = tl.full([], ft.LOWEST, tl.float64)
    decay = tl.where(decay.to(tl.float64) < lowest, lowest, decay.to(tl.float64))
    decay = (tl.cumsum(decay, 0) * tl.full([], ft.LOG2_E, tl.float64)).to(K.ACC)

    sends = step > 0
    source = decay - tl.where(sends, tl.log2(tl.where(sends, step, 1.0)), float("-inf"))
    numbers = ft.Rows(rows, padded, COUNT)
    at = ft.first_row_at(numbers, chunk, head, K.HEADS)  # [Q, H]
    tl.store(at + DECAY * padded, decay, mask=used)
    tl.store(at + SOURCE * padded, source, mask=used)
    if COUNT > STEP:
        tl.store(at + STEP * padded, step, mask=used)


@triton.jit
def edges(decay, source, total, doc, place, tile, last, K):
    """entry [Q], exit [Q] and whole of a tile, as docs/kernels.md has them ("In pure torch")."""
    entry, exit, through = tl.exp2(decay), tl.exp2(total - source), tl.exp2(total)
    if place.seq_idx is not None:
        entering = ft.document(place, tile, tl.maximum(tile.t0 - 1, tile.start))
        leaving = tl.sum(ft.document(place, last, last.t0 + last.q), 0)
        entry = tl.where(doc == entering, entry, 0.0)
        exit = tl.where(doc == leaving, exit, 0.0)
        through = tl.where(entering == leaving, through, 0.0)
    return entry, exit, through


@triton.jit
def documents_of(place, tile):
    """The document of each token of a tile; zeros where there are no documents."""
    doc = tile.q * 0
    if place.seq_idx is not None:
        doc = ft.document(place, tile, tile.t0 + tile.q)
    return doc


@triton.jit(
    do_not_specialize=["x_token", "B_token", "C_token", "z_token", "length", "padded", "sequences"]
)
def forward_kernel(
    x, B, C, z, D, rows, initial_states, seq_idx, cu_seqlens, y, final_states, ends, whole,
    x_token, B_token, C_token, z_token, length, padded, sequences, K, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Write y and the final states.

    A program owns one segment of a sequence, one head and one slice of its channels.
    """
    xs, Bs = ft.View(x, x_token * K.UNIT), ft.View(B, B_token * K.UNIT)
    Cs, zs = ft.View(C, C_token * K.UNIT), ft.View(z, z_token * K.UNIT)
    ys, decays = ft.View(y, K.HEADS * K.P), ft.Rows(rows, padded, ft.FORWARD_ROWS)
    place = ft.Place(seq_idx, cu_seqlens, sequences, length)
    p, head, seg, seq = ft.owned(tl.program_id(0), SEGMENTS, K)
    group = head // K.PER_GROUP
    q, n = tl.arange(0, K.Q), tl.arange(0, K.N2)
    first = ft.sequence(place, seq, q)
    first_tile, end_tile = ft.segment(seg, first.end - first.start, SEGMENTS, K.Q)
    S = ft.entering(
        initial_states, seq, ends, whole, seq * SEGMENTS, seg, head, p, n, K, SEGMENTS, 1
    )

    for k in range(first_tile, end_tile):
        tile = ft.move(first, first.start + k * K.Q, q)
        last = ft.last_of(tile, K.Q)
        X = ft.load_tile(xs, tile, head, p, K.P)  # [Q, PS]
        B_ = ft.load_tile(Bs, tile, group, n, K.N)  # [Q, N2]
        C_ = ft.load_tile(Cs, tile, group, n, K.N)  # [Q, N2]
        decay, source = ft.load_decays(decays, tile, head, K)
        total = ft.load_decay_of_last(decays, last, head, K)
        doc = documents_of(place, tile)
        entry, exit, through = edges(decay, source, total, doc, place, tile, last, K)
        seen = (q[:, None] <= q[None, :]) & (doc[:, None] == doc[None, :])  # [j, i], j <= i
        L = tl.exp2(tl.where(seen, decay[None, :] - source[:, None], float("-inf")))
        W = ft.dot(B_, tl.trans(C_), K) * L  # [j, i]
        out = ft.dot(S, tl.trans(C_), K) * entry[None, :]  # [PS, Q]
        out = ft.dot(tl.trans(X), W, K, out)
        weighted = X.to(K.ACC) * exit[:, None]
        S = ft.dot(tl.trans(weighted), B_, K, S * through)

        out = tl.trans(out)  # [Q, PS]
        if D is not None:
            out += X.to(K.ACC) * ft.load_skip(D, head, p, K)
        if z is not None:
            out *= silu(ft.load_tile(zs, tile, head, p, K.P).to(K.ACC))
        ft.store_tile(out, ys, tile, head, p, K.P)

    if seg == SEGMENTS - 1:
        ft.store_state(S, final_states, seq, head, p, n, K)


@triton.jit
def sweep(
    S, v, weights, decays, states, place, seq, seg, head, p, K,
    SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Carry a state S over a segment. In reverse S is the gradient of a state.

    `v` and `weights` are x and B, in reverse G and C. Stores in `states`, if given, the state that
    enters each chunk, in reverse the gradient of the state that leaves it. Returns the last state,
    and the decay of the whole segment.
    """
    TILES: tl.constexpr = K.CHUNK // K.Q
    q, n = tl.arange(0, K.Q), tl.arange(0, K.N2)
    group = head // K.PER_GROUP
    first = ft.sequence(place, seq, q)
    tokens = first.end - first.start
    first_chunk, end_chunk = ft.segment(seg, tokens, SEGMENTS, K.CHUNK)
    first_tile, end_tile = first_chunk * TILES, tl.minimum(end_chunk * TILES, tl.cdiv(tokens, K.Q))
    slot = ft.slot_of(place, seq, first.start, K.CHUNK)
    whole = tl.full([], 1.0, K.ACC)
    for k in range(first_tile, end_tile):
        i = first_tile + end_tile - 1 - k if REVERSE else k
        tile = ft.move(first, first.start + i * K.Q, q)
        last = ft.last_of(tile, K.Q)
        if states is not None:
            ends_chunk = (i + 1) % TILES == 0 or i == tl.cdiv(tokens, K.Q) - 1
            if ends_chunk if REVERSE else i % TILES == 0:
                ft.store_state(S, states, slot + i // TILES, head, p, n, K)
        decay, source = ft.load_decays(decays, tile, head, K)
        total = ft.load_decay_of_last(decays, last, head, K)
        if TILES > 1:  # from the tile's start instead of the chunk's
            before = ft.move(tile, tl.maximum(tile.t0 - 1, tile.start), tl.arange(0, 1))
            start = ft.load_decay_of_last(decays, before, head, K)
            start = tl.where(i % TILES == 0, 0.0, start)
            decay, source, total = decay - start, source - start, total - start
        doc = documents_of(place, tile)
        entry, exit, through = edges(decay, source, total, doc, place, tile, last, K)
        factors = entry if REVERSE else exit
        weighted = ft.load_tile(v, tile, head, p, K.P).to(K.ACC) * factors[:, None]  # [Q, PS]
        W = ft.load_tile(weights, tile, group, n, K.N)  # [Q, N2]
        S = ft.dot(tl.trans(weighted), W, K, S * through)
        whole *= through
    return S, whole


@triton.jit(
    do_not_specialize=["x_token", "B_token", "C_token", "G_token", "length", "padded", "sequences"]
)
def states_kernel(
    x, B, C, G, rows, initial_states, dfinal, seq_idx, cu_seqlens,
    dinitial, ends, dends, whole, states, dstates,
    x_token, B_token, C_token, G_token, length, padded, sequences, K,
    SEGMENTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program owns one segment of a sequence, one head and one slice, in one of two directions.

    G is the gradient of y before the gate. Without `states` the kernel writes the state in which
    each segment ends if it starts from zero (`ends`, in reverse `dends`), and the decay of each
    segment (`whole`). With `states` it writes the states between all chunks. If there are several
    segments it starts from what the first launch wrote.
    """
    xs, Bs = ft.View(x, x_token * K.UNIT), ft.View(B, B_token * K.UNIT)
    Cs, Gs = ft.View(C, C_token * K.UNIT), ft.View(G, G_token * K.UNIT)
    decays = ft.Rows(rows, padded, COUNT)
    place = ft.Place(seq_idx, cu_seqlens, sequences, length)
    p, head, seg, seq = ft.owned(tl.program_id(0), SEGMENTS, K)
    reverse, seq = seq // sequences, seq % sequences
    n = tl.arange(0, K.N2)
    index = seq * SEGMENTS + seg

    if reverse == 0:
        S = tl.zeros([K.PS, K.N2], K.ACC)
        if states is not None:
            S = ft.entering(
                initial_states, seq, ends, whole, index - seg, seg, head, p, n, K, SEGMENTS, 1
            )
        S, decay = sweep(S, xs, Bs, decays, states, place, seq, seg, head, p, K, SEGMENTS, False)
        if states is None:
            ft.store_state(S, ends, index, head, p, n, K)
            if tl.program_id(0) % (K.P2 // K.PS) == 0:
                tl.store(whole + index * K.HEADS + head, decay)
    elif G is not None:
        dS = tl.zeros([K.PS, K.N2], K.ACC)
        if states is not None:
            after = SEGMENTS - 1 - seg
            dS = ft.entering(
                dfinal, seq, dends, whole, index + after, after, head, p, n, K, SEGMENTS, -1
            )
        dS, _ = sweep(dS, Gs, Cs, decays, dstates, place, seq, seg, head, p, K, SEGMENTS, True)
        if states is None:
            ft.store_state(dS, dends, index, head, p, n, K)
        elif dinitial is not None and seg == 0:
            ft.store_state(dS, dinitial, seq, head, p, n, K)


def compute_decays(inputs: ScanInputs, K: Constants, chunk: int, count: int) -> tuple[Tensor, int]:
    """Numbers of each token and head, and for how many tokens a row of them has room.

    There are `count` numbers. The kernel writes DECAY and SOURCE (and STEP if there is room) for
    chunks of `chunk` tokens.
    """
    dt = side_by_side(inputs.dt)
    batch, length, heads = dt.shape
    padded = 16 * ceil_divide(length, 16)  # rows begin at aligned addresses
    exact = torch.float64 if tl.float64 == K.ACC else torch.float32
    rows = torch.empty(batch, heads, count, padded, dtype=exact, device=dt.device)
    at_once = heads_at_once(heads)
    sequences = inputs.sequences
    chunks = slots(sequences, batch, length, inputs.cu_seqlens is not None, chunk)
    launcher(decays_kernel, (in_tiles(K, 0, chunk, 0), at_once, count))(
        (chunks * ceil_divide(heads, at_once),),
        (dt, inputs.A, inputs.dt_bias, inputs.cu_seqlens, rows),
        (token_stride(dt), length, padded, sequences),
    )
    return rows, padded


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y and the final states."""
    batch, length, heads, P = inputs.x.shape
    sequences, D, initial = inputs.sequences, inputs.D, inputs.initial_states
    x, B, C = (side_by_side(t) for t in (inputs.x, inputs.B, inputs.C))
    z = side_by_side(inputs.z)
    unit, tokens = strides(x, B, C, z)
    family, multiprocessors = family_and_processors(x.device)
    K, config = configured("forward", family, constants(inputs, unit, family), 0)
    slices = K.P2 // K.PS
    count = segments(sequences, heads, slices, batch * length, multiprocessors)
    programs = (sequences * count * heads * slices,)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = inputs.empty_states()
    ends = whole = None
    where = inputs.seq_idx, inputs.cu_seqlens
    with torch.cuda.device_of(x):
        rows, padded = compute_decays(inputs, K, K.Q, ft.FORWARD_ROWS)
        sizes = length, padded, sequences
        if count > 1:
            new = partial(torch.empty, dtype=states.dtype, device=x.device)
            ends, whole = new(sequences, count, heads, P, K.N), new(sequences, count, heads)
            given = (x, B, C, None, rows, None, None, *where, None, ends, None, whole, None, None)
            launcher(states_kernel, (K, count, ft.FORWARD_ROWS), config.warps, config.stages)(
                programs, given, (*tokens[:3], 0, *sizes)
            )
        launcher(forward_kernel, (K, count), config.warps, config.stages)(
            programs,
            (x, B, C, z, D, rows, initial, *where, y, states, ends, whole),
            (*tokens, *sizes),
        )
    return y, states
