"""What the fused kernels share: how they address tensors, tiles, sequences, segments and states.

docs/kernels.md defines chunk, tile, slice and segment. A kernel's argument K, which
`fused_plan.Constants` describes, has their sizes: a tile has Q tokens, a chunk CHUNK tokens, a
slice PS channels. P is the head size and N the state size; P2 and N2 are these padded to powers of
two.

Values inside a kernel belong to Triton's compiler and have no Python types, so the fields of the
tuples here are `Any`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ysnake_kernels import triton_products
from ysnake_kernels.numerics import SMALLEST_LOG_DECAY
from ysnake_kernels.triton_math import clamp, finite, softplus

# An array has these numbers for each token and head. Kernels write them for later kernels.
DECAY = tl.constexpr(0)  # cumulative log2 decay from the chunk's start to the token
SOURCE = tl.constexpr(1)  # DECAY minus the log2 of the step size
STEP = tl.constexpr(2)  # dt after bias, softplus and limits
INTO = tl.constexpr(3)  # flow into a token from all tokens before it
SENT = tl.constexpr(4)  # flow from a token to the later tokens of its chunk
ONWARD = tl.constexpr(5)  # flow from a token to the leaving state
DSTEP = tl.constexpr(6)  # gradient of the step size without the part that goes through the decay
FORWARD_ROWS, BACKWARD_ROWS = 2, 7

LOWEST = tl.constexpr(SMALLEST_LOG_DECAY)
LOG2_E = tl.constexpr(1.4426950408889634)


# What a kernel is given


class View(NamedTuple):
    """A tensor (tokens, heads or groups, channels). `token` is the stride of the tokens. The
    heads and channels of a token lie side by side."""

    data: Any
    token: Any


class Rows(NamedTuple):
    """The array of numbers: COUNT rows for each head, with room for `padded` tokens in a row."""

    data: Any
    padded: Any
    COUNT: Any


class Place(NamedTuple):
    """Where sequences and documents begin."""

    seq_idx: Any
    cu_seqlens: Any
    sequences: Any
    length: Any


# One tile


class Tile(NamedTuple):
    """Tokens t0 + q of a row of the batch: a tile, or a whole chunk, or one token.

    Their sequence goes from token `start` to `end` of the row. The rows before have `earlier`
    tokens.
    """

    row: Any
    earlier: Any
    start: Any
    end: Any
    t0: Any
    q: Any


@triton.jit
def move(tile, t0, q):
    """Tokens t0 + q of the same sequence."""
    return Tile(tile.row, tile.earlier, tile.start, tile.end, t0, q)


@triton.jit
def last_of(tile, SIZE: tl.constexpr):
    """The last token of SIZE tokens from t0 on that lies in the sequence, as a tile of one."""
    return move(tile, tl.minimum(tile.t0 + SIZE, tile.end) - 1, tl.arange(0, 1))


@triton.jit
def inside(tile):
    return tile.t0 + tile.q < tile.end


@triton.jit
def pointers(v, tile, head, c, WIDTH: tl.constexpr):
    """Pointers to channels c of a tile, and which of them exist. A head has WIDTH channels."""
    first = (tile.earlier + tile.t0).to(tl.int64) * v.token + head * WIDTH
    at = v.data + first + tile.q[:, None] * v.token + c[None, :]
    return at, inside(tile)[:, None] & (c < WIDTH)[None, :]


@triton.jit
def load_tile(v, tile, head, c, WIDTH: tl.constexpr):  # [Q, C]
    """Channels c of a tile, zero outside the sequence."""
    at, mask = pointers(v, tile, head, c, WIDTH)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_tile(values, v, tile, head, c, WIDTH: tl.constexpr):
    at, mask = pointers(v, tile, head, c, WIDTH)
    tl.store(at, values.to(v.data.dtype.element_ty), mask=mask)


@triton.jit
def row_at(rows, tile, head, HEADS: tl.constexpr, ROW: tl.constexpr):
    """Pointers to one number of each token of a tile [Q]."""
    row = (tile.row.to(tl.int64) * HEADS + head) * rows.COUNT + ROW
    return rows.data + row * rows.padded + tile.t0 + tile.q


@triton.jit
def first_row_at(rows, tile, head, HEADS: tl.constexpr):
    """Pointers to the first number of each token of a tile and of heads [Q, H]."""
    row = (tile.row.to(tl.int64) * HEADS + head[None, :]) * rows.COUNT
    return rows.data + row * rows.padded + tile.t0 + tile.q[:, None]


@triton.jit
def load_row(rows, tile, head, K, ROW: tl.constexpr, OUTSIDE: tl.constexpr = 0.0):  # [Q]
    """One number of each token of a tile, OUTSIDE for tokens after the end of the sequence."""
    return tl.load(row_at(rows, tile, head, K.HEADS, ROW), mask=inside(tile), other=OUTSIDE)


@triton.jit
def store_row(values, rows, tile, head, K, ROW: tl.constexpr):
    tl.store(row_at(rows, tile, head, K.HEADS, ROW), values, mask=inside(tile))


@triton.jit
def load_decays(rows, tile, head, K):  # [Q], [Q]
    """DECAY and SOURCE of a tile. Tokens after the end receive nothing and send nothing."""
    decay = load_row(rows, tile, head, K, DECAY, float("-inf"))
    return decay, load_row(rows, tile, head, K, SOURCE, float("inf"))


@triton.jit
def load_decay_of_last(rows, last, head, K):
    """DECAY of the token of a tile of one."""
    return tl.sum(tl.load(row_at(rows, last, head, K.HEADS, DECAY)), 0)


@triton.jit
def load_skip(D, head, p, K):  # [1, PS]
    """D, in a shape that multiplies a tile."""
    at_channel = D + head * K.P + p if K.D_PER_CHANNEL else D + head + p * 0
    return tl.load(at_channel, mask=p < K.P, other=0.0).to(K.ACC)[None, :]


@triton.jit
def dot(a, b, K, acc=None):
    """acc + a b, in the arithmetic of K."""
    return triton_products.dot(a, b, acc, K.DOT, K.PRECISION)


@triton.jit
def step_sizes(raw, bias, used, K):
    """clamp(softplus(raw + bias)) and its derivative; zero where not `used`."""
    step = raw.to(K.ACC) + bias
    slope = step * 0.0 + 1.0
    if K.SOFTPLUS:
        slope = tl.sigmoid(step)
        step = softplus(step)
    low, high = tl.full([], K.LOW, K.ACC), tl.full([], K.HIGH, K.ACC)
    slope = tl.where(used & (step >= low) & (step <= high), slope, 0.0)
    return tl.where(used, clamp(step, K.LOW, K.HIGH), 0.0), slope


@triton.jit
def load_dt(dt, dt_bias, token, chunk, head, K):
    """dt of a chunk and heads [Q, H], its bias [1, H], and which of them exist [Q, H]."""
    used = inside(chunk)[:, None] & (head < K.HEADS)[None, :]
    first = (chunk.earlier + chunk.t0).to(tl.int64) * token
    raw = tl.load(dt + first + chunk.q[:, None] * token + head[None, :], mask=used, other=0.0)
    bias = tl.zeros([1], K.ACC)[:, None]
    if dt_bias is not None:
        bias = tl.load(dt_bias + head, mask=head < K.HEADS, other=0.0).to(K.ACC)[None, :]
    return raw, bias, used


@triton.jit
def log_decays(step, A, head, K):
    """step A of a chunk and heads [Q, H], not yet cut at LOWEST, and the rates A [1, H]."""
    rates = tl.load(A + head, mask=head < K.HEADS, other=0.0).to(K.ACC)
    rates = finite(rates)[None, :]
    return step * rates, rates


@triton.jit
def document(place, tile, t):
    """The documents of tokens t of the tile's sequence. After its end: that of the last token."""
    return tl.load(place.seq_idx + tile.earlier + tl.minimum(t, tile.end - 1))


# Sequences, segments and their states


@triton.jit
def sequence(place, seq, q):
    """The first tile of sequence `seq`."""
    row, start, end = seq, seq * 0, seq * 0 + place.length
    if place.cu_seqlens is not None:
        row, start = seq * 0, tl.load(place.cu_seqlens + seq).to(tl.int32)
        end = tl.load(place.cu_seqlens + seq + 1).to(tl.int32)
    return Tile(row, row.to(tl.int64) * place.length, start, end, start, q)


@triton.jit
def segment(seg, tokens, SEGMENTS: tl.constexpr, Q: tl.constexpr):
    """The first tile of a segment, and the tile after its last. The last segment may have fewer."""
    tiles = tl.cdiv(tokens, Q)
    each = tl.cdiv(tiles, SEGMENTS)
    return tl.minimum(seg * each, tiles), tl.minimum(seg * each + each, tiles)


@triton.jit
def slot_of(place, seq, start, CHUNK: tl.constexpr):
    """Where a sequence's chunks begin in an array of all chunks. Packed sequences leave gaps."""
    per_row = tl.cdiv(place.length, CHUNK)
    return seq * per_row if place.cu_seqlens is None else start // CHUNK + seq


@triton.jit
def chunk_in(place, slot, CHUNK: tl.constexpr):
    """The chunk in a slot of the array of all chunks. It may lie after the end of its sequence."""
    seq = slot // tl.cdiv(place.length, CHUNK)
    if place.cu_seqlens is not None:  # the last sequence whose first slot is at most this slot
        seq = slot * 0 - 1
        for first in range(0, place.sequences, 256):
            s = first + tl.arange(0, 256)
            known = s < place.sequences
            start = tl.load(place.cu_seqlens + s, mask=known, other=0).to(tl.int32)
            seq += tl.sum((known & (start // CHUNK + s <= slot)).to(tl.int32), 0)
    chunk = sequence(place, seq, tl.arange(0, CHUNK))
    before = slot - slot_of(place, seq, chunk.start, CHUNK)
    return move(chunk, chunk.start + before * CHUNK, chunk.q)


@triton.jit
def owned(pid, SEGMENTS: tl.constexpr, K):
    """What a program of a sweep computes: channels p [PS], their head, a segment, a sequence."""
    SLICES: tl.constexpr = K.P2 // K.PS
    p = pid % SLICES * K.PS + tl.arange(0, K.PS)
    rest = pid // (SLICES * K.HEADS)
    return p, pid // SLICES % K.HEADS, rest % SEGMENTS, rest // SEGMENTS


@triton.jit
def state_at(states, index, head, p, n, K):  # [PS, N2]
    """Pointers and mask of one head's state in a contiguous (index, head, P, N)."""
    base = states + (index.to(tl.int64) * K.HEADS + head) * (K.P * K.N)
    return base + p[:, None] * K.N + n[None, :], (p < K.P)[:, None] & (n < K.N)[None, :]


@triton.jit
def load_state(states, index, head, p, n, K):
    at, mask = state_at(states, index, head, p, n, K)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_state(S, states, index, head, p, n, K):
    at, mask = state_at(states, index, head, p, n, K)
    tl.store(at, S.to(states.dtype.element_ty), mask=mask)


@triton.jit
def entering(
    states, seq, ends, whole, first, count, head, p, n, K,
    SEGMENTS: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """The state [PS, N2] that enters a segment: the sequence's first, if any, carried over `count`
    segments from the index `first` on, forwards (DIRECTION 1) or backwards (DIRECTION -1)."""
    S = tl.zeros([K.PS, K.N2], K.ACC)
    if states is not None:
        S += load_state(states, seq, head, p, n, K).to(K.ACC)
    if SEGMENTS > 1:
        for k in range(count):
            i = first + k * DIRECTION
            decay = tl.load(whole + i * K.HEADS + head)
            S = S * decay + load_state(ends, i, head, p, n, K)
    return S
