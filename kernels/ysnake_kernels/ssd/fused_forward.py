"""The fused forward: one body that walks the tiles of a sequence with the state in registers.

With few heads and a long sequence it runs per segment, from a state that it combines from the ends
of the segments before; a light sweep, which the backward also uses, computes those ends first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd import fused_tiles as ft
from ysnake_kernels.ssd.fused_tiles import device, segments

# What the kernels of a backward tell each other about each token
STEP = tl.constexpr(0)  # dt after bias, softplus and limits
DECAY = tl.constexpr(1)  # log decay from the chunk's start to the token
INTO = tl.constexpr(2)  # flow into a token from all before it
SENT = tl.constexpr(3)  # flow from a token to those after it in its chunk
ONWARD = tl.constexpr(4)  # flow from a token to the leaving state
DSTEP = tl.constexpr(5)  # gradient of step but for its part in the decay


@triton.jit(do_not_specialize=["length"])
def forward_kernel(scan, y, final_states, ends, whole, length, K, SEGMENTS: tl.constexpr):
    """A program owns one segment of a sequence, one head, one slice of its channels."""
    p, head, seg, seq = ft.owned(tl.program_id(0), scan.heads, SEGMENTS, K)
    heads, group = scan.heads, head // scan.per_group
    q, n = tl.arange(0, K.Q), tl.arange(0, K.N2)
    first = ft.sequence(scan, seq, length, q)
    first_tile, end_tile = ft.segment(seg, first.end - first.start, SEGMENTS, K.Q)
    a = tl.load(scan.A + head).to(K.ACC)
    begin = scan.initial_states, seq, ends, whole, seq * SEGMENTS, seg
    S = ft.entering(*begin, head, heads, p, n, K, SEGMENTS, 1)

    for k in range(first_tile, end_tile):
        tile = ft.move(first, first.start + k * K.Q, q)
        x = ft.load_tile(scan.x, tile, head, p, K.P)  # [Q, PS]
        B = ft.load_tile(scan.B, tile, group, n, K.N)  # [Q, N2]
        C = ft.load_tile(scan.C, tile, group, n, K.N)  # [Q, N2]
        step, _ = ft.step_sizes(scan, tile, head, K)
        cs, entry, exit, through, doc = ft.decays(step * a, scan, tile, K)
        seen = (q[:, None] <= q[None, :]) & (doc[:, None] == doc[None, :])  # [j, i], j <= i
        L = tl.exp(tl.where(seen, cs[None, :] - cs[:, None], float("-inf")))
        W = ft.dot(B, tl.trans(C), K) * L * step[:, None]  # [j, i]
        out = ft.dot(S, tl.trans(C), K) * entry[None, :]  # [PS, Q]
        out += ft.dot(tl.trans(x), W, K)
        weighted = x.to(K.ACC) * (step * exit)[:, None]
        S = S * through + ft.dot(tl.trans(weighted), B, K)

        out = tl.trans(out)  # [Q, PS]
        if scan.D is not None:
            out += x.to(K.ACC) * ft.load_skip(scan.D, head, p, K)
        if scan.z is not None:
            out *= ft.silu(ft.load_tile(scan.z, tile, head, p, K.P).to(K.ACC))
        ft.store_tile(out, y, tile, head, p, K.P)

    if seg == SEGMENTS - 1:
        ft.store_state(S, final_states, seq, head, heads, p, n, K)


@triton.jit
def sweep(
    S, scan, dy, states, scratch, seq, seg, head, p, length, K,
    SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Carry a state over a segment: forward S with x and B; in reverse its gradient with dy and C.

    Stores in `states` the state that enters each chunk, or the gradient of the one that leaves it;
    and forward the step sizes and the log decays from the chunk's start. Returns the last state,
    and the decay of the whole segment.
    """
    TILES: tl.constexpr = K.CHUNK // K.Q
    q, n = tl.arange(0, K.Q), tl.arange(0, K.N2)
    group = head // scan.per_group
    first = ft.sequence(scan, seq, length, q)
    tokens = first.end - first.start
    first_chunk, end_chunk = ft.segment(seg, tokens, SEGMENTS, K.CHUNK)
    first_tile, end_tile = first_chunk * TILES, tl.minimum(end_chunk * TILES, tl.cdiv(tokens, K.Q))
    slot = ft.slot_of(scan, seq, first.start, length, K.CHUNK)
    a = tl.load(scan.A + head).to(K.ACC)
    whole = tl.full([], 1.0, K.ACC)
    before = tl.full([], 0.0, K.ACC)  # log decay from the chunk's start to the tile
    for k in range(first_tile, end_tile):
        i = first_tile + end_tile - 1 - k if REVERSE else k
        tile = ft.move(first, first.start + i * K.Q, q)
        if states is not None:
            ends_chunk = (i + 1) % TILES == 0 or i == tl.cdiv(tokens, K.Q) - 1
            if ends_chunk if REVERSE else i % TILES == 0:
                ft.store_state(S, states, slot + i // TILES, head, scan.heads, p, n, K)
                before *= 0.0
        step, _ = ft.step_sizes(scan, tile, head, K)
        decay, entry, exit, through, _ = ft.decays(step * a, scan, tile, K)
        if REVERSE:
            v = ft.load_gated(scan, dy, tile, head, p, K).to(K.ACC) * entry[:, None]  # [Q, PS]
            B = ft.load_tile(scan.C, tile, group, n, K.N)  # [Q, N2]
        else:
            v = ft.load_tile(scan.x, tile, head, p, K.P).to(K.ACC) * (step * exit)[:, None]
            B = ft.load_tile(scan.B, tile, group, n, K.N)
            if states is not None:
                ft.store_row(step, scratch, tile, head, STEP)
                decay += before
                ft.store_row(decay, scratch, tile, head, DECAY)
                before = tl.sum(tl.where(q == K.Q - 1, decay, 0.0), 0)
        S = S * through + ft.dot(tl.trans(v), B, K)
        whole *= through
    return S, whole


@triton.jit(do_not_specialize=["length"])
def states_kernel(
    scan, dy, dfinal, dinitial, ends, dends, whole, states, dstates, scratch, sequences, length, K,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """A program owns what a program of `forward_kernel` owns, in one of two directions.

    Without `states`: each segment's end from a zero state, and its whole decay. With `states`: the
    states between all chunks, from `ends` where there is more than one segment.
    """
    p, head, seg, seq = ft.owned(tl.program_id(0), scan.heads, SEGMENTS, K)
    reverse, seq = seq // sequences, seq % sequences
    heads, n = scan.heads, tl.arange(0, K.N2)
    index = seq * SEGMENTS + seg

    S = tl.zeros([K.PS, K.N2], K.ACC)
    if reverse == 0:
        if states is not None:
            begin = scan.initial_states, seq, ends, whole, index - seg, seg
            S = ft.entering(*begin, head, heads, p, n, K, SEGMENTS, 1)
        S, decay = sweep(
            S, scan, None, states, scratch, seq, seg, head, p, length, K, SEGMENTS, False
        )
        if states is None:
            ft.store_state(S, ends, index, head, heads, p, n, K)
            if tl.program_id(0) % (K.P2 // K.PS) == 0:
                tl.store(whole + index * heads + head, decay)
    elif dy is not None:
        if states is not None:
            after = SEGMENTS - 1 - seg
            begin = dfinal, seq, dends, whole, index + after, after
            S = ft.entering(*begin, head, heads, p, n, K, SEGMENTS, -1)
        S, _ = sweep(S, scan, dy, dstates, scratch, seq, seg, head, p, length, K, SEGMENTS, True)
        if states is None:
            ft.store_state(S, dends, index, head, heads, p, n, K)
        elif dinitial is not None and seg == 0:
            ft.store_state(S, dinitial, seq, head, heads, p, n, K)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """y and the final states, of the fields of a Scan, softplus and the limits of dt. One launch,
    or two where the sequences are cut into segments."""
    given, options = ft.Scan(*arguments[:11]), arguments[11:]
    x, N = given.x, given.B.shape[3]
    batch, length, heads, P = x.shape
    sequences = batch if given.cu_seqlens is None else len(given.cu_seqlens) - 1
    scan, K = ft.as_kernels_see(given, *options)
    family, multiprocessors = device(x.device)
    K, options = ft.launch("forward", family, K)
    slices = K.P2 // K.PS
    count = segments(sequences, heads, slices, batch * length, multiprocessors)
    grid = (sequences * count * heads * slices,)
    exact = {"dtype": accumulator(*given[:9]), "device": x.device}

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_states = torch.empty(sequences, heads, P, N, **exact)
    ends = whole = None
    with torch.cuda.device_of(x):
        if count > 1:
            ends = torch.empty(sequences, count, heads, P, N, **exact)
            whole = torch.empty(sequences, count, heads, **exact)
            states_kernel[grid](
                scan, None, None, None, ends, None, whole, None, None, None, sequences, length,
                ft.static(K._replace(CHUNK=K.Q)), SEGMENTS=count, **options,
            )  # fmt: skip
        forward_kernel[grid](
            scan,
            ft.view(y),
            final_states,
            ends,
            whole,
            length,
            ft.static(K),
            SEGMENTS=count,
            **options,
        )
    return y, final_states
