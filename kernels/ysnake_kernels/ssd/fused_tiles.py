"""What the fused kernels share: how they see tensors, sequences and segments, the arithmetic of one
tile of tokens, and the table of launch configurations.

A tile is Q tokens of one sequence. A chunk is one or several tiles; cumulative decays start anew at
each chunk. P is the head size and N the state size; P2 and N2 are these padded to powers of two. A
program handles PS of the P2 channels of a head, a slice.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import SMALLEST_LOG_DECAY, ceil_divide, common_unit, next_power_of_2
from ysnake_kernels.ssd.inputs import DIFFERENTIABLE, ScanInputs
from ysnake_kernels.triton_math import clamp, finite, softplus

LARGEST = 256  # head size and state size
MOST_SEGMENTS = 32
SHORTEST_SEGMENT = 512  # tokens; shorter ones spend their time on the states between them

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Rows of the array of per-token, per-head numbers that kernels pass on to later kernels
DECAY = tl.constexpr(0)  # cumulative log2 decay from the chunk's start to the token
SOURCE = tl.constexpr(1)  # DECAY minus the log2 of the step size
STEP = tl.constexpr(2)  # dt after bias, softplus and limits
INTO = tl.constexpr(3)  # flow into a token from all tokens before it
SENT = tl.constexpr(4)  # flow from a token to the later tokens of its chunk
ONWARD = tl.constexpr(5)  # flow from a token to the leaving state
DSTEP = tl.constexpr(6)  # gradient of the step size but for its part in the decay
FORWARD_ROWS, BACKWARD_ROWS = 2, 7

LOWEST = tl.constexpr(SMALLEST_LOG_DECAY)
LOG2_E = tl.constexpr(1.4426950408889634)


# What a kernel is given


class View(NamedTuple):
    """In a kernel: a tensor (tokens, heads or groups, channels); `token` is the stride of tokens,
    heads and channels lie side by side."""

    data: Any
    token: Any


class Rows(NamedTuple):
    """In a kernel: COUNT rows of numbers for each head, one number a token. The rows have room for
    `padded` tokens."""

    data: Any
    padded: Any
    COUNT: Any


class Place(NamedTuple):
    """In a kernel: where sequences and documents begin."""

    seq_idx: Any
    cu_seqlens: Any
    sequences: Any
    length: Any


class Constants(NamedTuple):
    """What a kernel knows when it is compiled; its argument `K`."""

    P: int
    N: int
    P2: int
    N2: int
    HEADS: int
    PER_GROUP: int  # heads of a group
    UNIT: int  # of the strides that a kernel is given
    D_PER_CHANNEL: bool
    SOFTPLUS: bool
    LOW: float
    HIGH: float
    ACC: tl.dtype  # of sums, exponents and states
    DOT: tl.dtype  # of the factors of products
    PRECISION: str
    Q: int = 0  # these from the table below
    CHUNK: int = 0
    PS: int = 0


def side_by_side(t: Tensor | None) -> Tensor | None:
    """t (batch, length, ...) with all numbers of a token side by side and rows of the batch at
    equal distances; a copy where they are not. Within a tile, kernels count in 32 bits."""
    if t is None or (t.is_contiguous() and t.stride(1) < 2**22):
        return t
    batch, length, *sizes = t.shape
    expected = 1
    fits = t.stride(1) < 2**22 and (batch == 1 or t.stride(0) == length * t.stride(1))
    for size, stride in zip(sizes[::-1], t.stride()[:1:-1], strict=True):
        fits &= size == 1 or stride == expected
        expected *= size
    return t if fits else t.contiguous()


def strides(*tensors: Tensor | None) -> tuple[int, list[int]]:
    """The largest unit up to 16 that divides the strides of the tokens, and the strides in it."""
    values = [0 if t is None else t.stride(1) for t in tensors]
    unit = common_unit(*values)
    return unit, [v // unit for v in values]


@cache
def arithmetic(family: str, tf32: bool, *dtypes: torch.dtype | None) -> tuple[Any, Any, str]:
    """Accumulator, dtype and precision of matrix products; the dtypes begin with those of x, B and
    C. `tf32`: whether the user lets float32 products round to it."""
    if torch.float64 in dtypes:
        return tl.float64, tl.float64, "ieee"
    if set(dtypes[:3]) == {torch.bfloat16}:
        return tl.float32, tl.bfloat16, "ieee"
    # tf32 holds every float16 and, unlike it, states and gradients of any size
    fast = tf32 or set(dtypes[:3]) == {torch.float16}
    fast &= not family.startswith("gfx") or family == "gfx942"  # others do not have it
    return tl.float32, tl.float32, "tf32" if fast else "ieee"


def tf32_is_allowed() -> bool:
    """Whether the user lets float32 products on a GPU round to tf32, by either of torch's
    settings. torch.get_float32_matmul_precision() raises where the newer one was used."""
    asked = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if asked == "none" else asked) == "tf32"


def constants(inputs: ScanInputs, unit: int, family: str) -> Constants:
    """What is known of the arguments before a kernel is compiled."""
    x, dt, A, B, C, D, z, initial_states, dt_bias = inputs[:DIFFERENTIABLE]
    tensors = x, B, C, dt, A, D, z, initial_states, dt_bias
    dtypes = [None if t is None else t.dtype for t in tensors]
    exact = torch.float32 in dtypes[:3] or torch.float16 in dtypes[:3]
    numbers = arithmetic(family, exact and tf32_is_allowed(), *dtypes)
    sizes = *x.shape[2:], *B.shape[2:]
    per_channel = D is not None and D.ndim == 2
    steps = bool(inputs.dt_softplus), *map(float, inputs.dt_limit)
    return _constants(*sizes, unit, per_channel, *steps, *numbers)


@cache
def _constants(heads: int, P: int, groups: int, N: int, *others: Any) -> Constants:
    return Constants(P, N, padded_size(P), padded_size(N), heads, heads // groups, *others)


def padded_size(size: int) -> int:
    """The next power of two, and at least 16, which a matrix product needs."""
    return max(16, next_power_of_2(size))


# One tile


class Tile(NamedTuple):
    """In a kernel: tokens t0 + q of a row of the batch, in a sequence from `start` to `end`; the
    rows before hold `earlier` tokens."""

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
    """Pointers to channels c of a tile, and whether each is one; WIDTH channels a head."""
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
    """One number of each token of a tile; OUTSIDE behind the end of the sequence."""
    return tl.load(row_at(rows, tile, head, K.HEADS, ROW), mask=inside(tile), other=OUTSIDE)


@triton.jit
def store_row(values, rows, tile, head, K, ROW: tl.constexpr):
    tl.store(row_at(rows, tile, head, K.HEADS, ROW), values, mask=inside(tile))


@triton.jit
def load_decays(rows, tile, head, K):  # [Q], [Q]
    """DECAY and SOURCE of a tile. Behind the end nothing arrives and nothing is sent."""
    decay = load_row(rows, tile, head, K, DECAY, float("-inf"))
    return decay, load_row(rows, tile, head, K, SOURCE, float("inf"))


@triton.jit
def load_decay_of_last(rows, last, head, K):
    """DECAY of the token of a tile of one."""
    return tl.sum(tl.load(row_at(rows, last, head, K.HEADS, DECAY)), 0)


@triton.jit
def load_skip(D, head, p, K):  # [1, PS]
    """D as it multiplies a tile."""
    at_channel = D + head * K.P + p if K.D_PER_CHANNEL else D + head + p * 0
    return tl.load(at_channel, mask=p < K.P, other=0.0).to(K.ACC)[None, :]


@triton.jit
def dot(a, b, K, acc=None):
    """acc + a b, factors rounded to DOT, summed in float32 (float64 for float64)."""
    a, b = a.to(K.DOT), b.to(K.DOT)
    if INTERPRETED and tl.bfloat16 == K.DOT:  # the interpreter multiplies the bits of a bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if tl.float64 == K.DOT:
        product = tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        product = tl.dot(a, b, acc, input_precision=K.PRECISION)
    return product


@triton.jit
def silu(v):
    return v * tl.sigmoid(v)


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
    """dt of a chunk and heads [Q, H], its bias [1, H], and which of them there are [Q, H]."""
    used = inside(chunk)[:, None] & (head < K.HEADS)[None, :]
    first = (chunk.earlier + chunk.t0).to(tl.int64) * token
    raw = tl.load(dt + first + chunk.q[:, None] * token + head[None, :], mask=used, other=0.0)
    bias = tl.zeros([1], K.ACC)[:, None]
    if dt_bias is not None:
        bias = tl.load(dt_bias + head, mask=head < K.HEADS, other=0.0).to(K.ACC)[None, :]
    return raw, bias, used


@triton.jit
def log_decays(step, A, head, K):
    """Of a chunk and heads [Q, H]: step A before it is cut at LOWEST, and the rates A [1, H]."""
    rates = tl.load(A + head, mask=head < K.HEADS, other=0.0).to(K.ACC)
    rates = finite(rates)[None, :]
    return step * rates, rates


@triton.jit
def document(place, tile, t):
    """The documents of tokens t of the tile's sequence; behind its end stands the last token's."""
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
    """The first tile and the end of tiles of a segment: equal numbers of tiles, the last fewer."""
    tiles = tl.cdiv(tokens, Q)
    each = tl.cdiv(tiles, SEGMENTS)
    return tl.minimum(seg * each, tiles), tl.minimum(seg * each + each, tiles)


@triton.jit
def slot_of(place, seq, start, CHUNK: tl.constexpr):
    """Where the chunks of a sequence begin in an array of all; packed sequences leave gaps."""
    per_row = tl.cdiv(place.length, CHUNK)
    return seq * per_row if place.cu_seqlens is None else start // CHUNK + seq


@triton.jit
def chunk_in(place, slot, CHUNK: tl.constexpr):
    """The chunk in a slot of the array of all; it may lie behind the end of its sequence."""
    seq = slot // tl.cdiv(place.length, CHUNK)
    if place.cu_seqlens is not None:  # the last sequence whose first slot is not behind this one
        seq = slot * 0 - 1
        for first in range(0, place.sequences, 256):
            s = first + tl.arange(0, 256)
            known = s < place.sequences
            start = tl.load(place.cu_seqlens + s, mask=known, other=0).to(tl.int32)
            seq += tl.sum((known & (start // CHUNK + s <= slot)).to(tl.int32), 0)
    chunk = sequence(place, seq, tl.arange(0, CHUNK))
    before = slot - slot_of(place, seq, chunk.start, CHUNK)
    return move(chunk, chunk.start + before * CHUNK, chunk.q)


def slots(sequences: int, batch: int, length: int, packed: bool, chunk: int) -> int:
    """The size of an array of all chunks of all sequences."""
    return length // chunk + sequences if packed else batch * ceil_divide(length, chunk)


@triton.jit
def owned(pid, SEGMENTS: tl.constexpr, K):
    """What a program of a sweep owns: channels p of a head [PS], a segment, a sequence."""
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
    """The state [PS, N2] with which a sequence begins, if any, after `count` segments from the
    index `first` on, forwards (DIRECTION 1) or backwards (DIRECTION -1)."""
    S = tl.zeros([K.PS, K.N2], K.ACC)
    if states is not None:
        S += load_state(states, seq, head, p, n, K).to(K.ACC)
    if SEGMENTS > 1:
        for k in range(count):
            i = first + k * DIRECTION
            decay = tl.load(whole + i * K.HEADS + head)
            S = S * decay + load_state(ends, i, head, p, n, K)
    return S


# Launch configurations


class Config(NamedTuple):
    tile: int  # Q
    p_slice: int  # most channels of a head that one program handles
    warps: int
    stages: int
    chunk: int = 0  # of "states" alone: tokens between the states that the backward stores


@cache
def device(place: torch.device) -> tuple[str, int]:
    """Its family ("sm_80", "sm_90", ..., "gfx942") and its number of multiprocessors."""
    if place.type != "cuda":
        return "interpreter", 1
    about = torch.cuda.get_device_properties(place)
    if torch.version.hip:
        family = about.gcnArchName.split(":")[0]
    else:  # torch has that name for NVIDIA's cards too: it is the card's
        family = f"sm_{about.major}{about.minor}"
    return family, about.multi_processor_count


# (kernel, bytes of a factor of its products, size[, family]) -> configuration; a state above 128 is
# wide, and what has no line of its own is usual.
#
# `forward` and `states` carry a state of p_slice x N2 numbers in registers, `rows` and `columns` a
# sum of tile x N2 and two of tile x chunk. Registers decide.
TABLE = {
    ("forward", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=3),
    ("states", 2, "usual"): Config(tile=64, p_slice=64, warps=4, stages=2, chunk=64),
    ("rows", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=1),
    ("columns", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=1),
    # the fastest on an H200; rows and columns spill, but two programs share a multiprocessor
    ("states", 2, "usual", "sm_90"): Config(tile=64, p_slice=64, warps=8, stages=2, chunk=64),
    ("rows", 2, "usual", "sm_90"): Config(tile=64, p_slice=64, warps=4, stages=2),
    ("columns", 2, "usual", "sm_90"): Config(tile=64, p_slice=64, warps=4, stages=2),
    ("forward", 2, "wide"): Config(tile=32, p_slice=64, warps=8, stages=1),
    ("states", 2, "wide"): Config(tile=64, p_slice=64, warps=8, stages=2, chunk=64),
    ("rows", 2, "wide"): Config(tile=32, p_slice=64, warps=8, stages=2),
    ("columns", 2, "wide"): Config(tile=32, p_slice=64, warps=8, stages=1),
    ("forward", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=2),
    ("states", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=2, chunk=32),
    ("rows", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=1),
    ("columns", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=1),
    ("forward", 4, "wide"): Config(tile=16, p_slice=32, warps=8, stages=1),
    ("states", 4, "wide"): Config(tile=16, p_slice=32, warps=8, stages=1, chunk=16),
    ("rows", 4, "wide"): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("columns", 4, "wide"): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("forward", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("states", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1, chunk=16),
    ("rows", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("columns", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1),
}


def configured(kind: str, family: str, K: Constants, chunk: int) -> tuple[Constants, Config]:
    """Of a kernel that works in chunks of `chunk` tokens (0: its tiles): its argument K, and its
    line of the table."""
    size = "wide" if K.N2 > 128 else "usual"
    config = TABLE[table_key(kind, K.DOT.primitive_bitwidth // 8, size, family)]
    return in_tiles(K, config.tile, chunk or config.tile, min(config.p_slice, K.P2)), config


def table_key(kind: str, item: int, size: str, family: str) -> tuple:
    """The line of the table for a kernel: the family's own, else the size's, else the usual."""
    keys = (kind, item, size, family), (kind, item, size), (kind, item, "usual")
    return next(key for key in keys if key in TABLE)


@cache
def in_tiles(K: Constants, tile: int, chunk: int, p_slice: int) -> Constants:
    return K._replace(Q=tile, CHUNK=chunk, PS=p_slice)


def segments(sequences: int, heads: int, slices: int, tokens: int, multiprocessors: int) -> int:
    """Into how many segments a sweep cuts each sequence: one where the programs fill the GPU.

    `tokens` are those of all sequences together. A segmented sweep reads its inputs twice, so two
    segments gain nothing.
    """
    programs = sequences * heads * slices
    if not 0 < programs < multiprocessors:
        return 1
    wanted = 2 * multiprocessors // programs
    count = min(wanted, tokens // sequences // SHORTEST_SEGMENT, MOST_SEGMENTS)
    return count if count > 2 else 1
