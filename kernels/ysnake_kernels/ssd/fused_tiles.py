"""What the fused kernels share: how they see tensors, sequences and segments, the arithmetic of one
tile of tokens, and the table of launch configurations.

A tile is Q tokens of one sequence. P is the head size and N the state size; P2 and N2 are these
padded to powers of two. A program handles PS of the P2 channels of a head, a slice.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import accumulator
from ysnake_kernels.triton_math import ROUND_ONCE, clamp, softplus

LARGEST = 256  # head size and state size
MOST_SEGMENTS = 32
SHORTEST_SEGMENT = 512  # tokens; shorter ones spend their time on the states between them

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# What a kernel is given


class View(NamedTuple):
    """A tensor (batch, token, head or group[, channel]) and its strides, as a kernel reads it."""

    data: Tensor
    batch: int
    token: int
    head: int
    channel: int


def view(t: Tensor | None) -> View | None:
    """Any strides; dt has no channels. Within a tile, kernels count elements in 32 bits."""
    if t is None:
        return None
    if 2 * LARGEST * max(t.stride()[1:2] + t.stride()[3:]) >= 2**31:
        t = t.contiguous()
    return View(t, *t.stride(), *([0] * (4 - t.ndim)))


class Scan(NamedTuple):
    """The arguments of a scan, and as a kernel reads them: views of all that has strides."""

    x: Tensor | View
    dt: Tensor | View
    A: Tensor
    B: Tensor | View
    C: Tensor | View
    D: Tensor | None
    z: Tensor | View | None
    initial_states: Tensor | None
    dt_bias: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    per_group: int = 0
    heads: int = 0


class Constants(NamedTuple):
    """What a kernel knows when it is compiled; its argument `K`."""

    P: int
    N: int
    P2: int
    N2: int
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


def arithmetic(*tensors: Tensor | None) -> dict:
    """Accumulator, dtype and precision of matrix products; the tensors begin with x, B and C."""
    products = {t.dtype for t in tensors[:3]}
    if accumulator(*tensors) == torch.float64:
        return {"ACC": tl.float64, "DOT": tl.float64, "PRECISION": "ieee"}
    if products == {torch.bfloat16}:
        return {"ACC": tl.float32, "DOT": tl.bfloat16, "PRECISION": "ieee"}
    # tf32 holds every float16 and, unlike it, states and gradients of any size
    fast = products == {torch.float16} or torch.get_float32_matmul_precision() != "highest"
    return {"ACC": tl.float32, "DOT": tl.float32, "PRECISION": "tf32" if fast else "ieee"}


def as_kernels_see(scan: Scan, softplus: bool, low: float, high: float) -> tuple[Scan, Constants]:
    """The arguments as views, and what is known of them before a kernel is compiled."""
    x, dt, A, B, C, D, z, initial_states, dt_bias = scan[:9]
    heads, P, groups, N = *x.shape[2:], *B.shape[2:]
    views = {name: view(getattr(scan, name)) for name in ("x", "dt", "B", "C", "z")}
    scan = scan._replace(**views, heads=heads, per_group=heads // groups)
    P2, N2 = (max(16, triton.next_power_of_2(size)) for size in (P, N))
    per_channel = D is not None and D.ndim == 2
    numbers = arithmetic(x, B, C, dt, A, D, z, initial_states, dt_bias)
    return scan, Constants(P, N, P2, N2, per_channel, softplus, low, high, **numbers)


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
def inside(tile):
    return tile.t0 + tile.q < tile.end


@triton.jit
def at(v, tile, head):
    """Pointer to t0 of a head; row, token and head may be far apart, so in 64 bits."""
    offset = tile.row.to(tl.int64) * v.batch + tile.t0.to(tl.int64) * v.token
    return v.data + offset + head.to(tl.int64) * v.head


@triton.jit
def load_tile(v, tile, head, c, WIDTH: tl.constexpr):  # [Q, C]
    """Channels c of a tile, zero outside the sequence."""
    offsets = tile.q[:, None] * v.token + c[None, :] * v.channel
    mask = inside(tile)[:, None] & (c < WIDTH)[None, :]
    return tl.load(at(v, tile, head) + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(values, v, tile, head, c, WIDTH: tl.constexpr):
    offsets = tile.q[:, None] * v.token + c[None, :] * v.channel
    mask = inside(tile)[:, None] & (c < WIDTH)[None, :]
    tl.store(at(v, tile, head) + offsets, values.to(v.data.dtype.element_ty), mask=mask)


@triton.jit
def load_row(v, tile, head, CHANNEL: tl.constexpr = 0):  # [Q]
    """One channel of a tile, zero outside the sequence."""
    first = at(v, tile, head) + tl.full([], CHANNEL, tl.int64) * v.channel
    return tl.load(first + tile.q * v.token, mask=inside(tile), other=0.0)


@triton.jit
def store_row(values, v, tile, head, CHANNEL: tl.constexpr = 0):
    first = at(v, tile, head) + tl.full([], CHANNEL, tl.int64) * v.channel
    tl.store(first + tile.q * v.token, values.to(v.data.dtype.element_ty), mask=inside(tile))


@triton.jit
def load_gated(scan, dy, tile, head, p, K):  # [Q, PS]
    """The gradient of y before the gate."""
    G = load_tile(dy, tile, head, p, K.P)
    if scan.z is not None:
        G = G.to(K.ACC) * silu(load_tile(scan.z, tile, head, p, K.P).to(K.ACC))
    return G


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
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    return tl.dot(a, b, acc, input_precision=K.PRECISION)


@triton.jit
def silu(v):
    return v * tl.sigmoid(v)


@triton.jit
def step_sizes(scan, tile, head, K):
    """clamp(softplus(dt + dt_bias)) and its derivative, [Q] each, zero outside the sequence."""
    step = load_row(scan.dt, tile, head).to(K.ACC)
    if scan.dt_bias is not None:
        step += tl.load(scan.dt_bias + head).to(K.ACC)
    slope = tl.full(tile.q.shape, 1.0, K.ACC)
    if K.SOFTPLUS:
        slope = tl.sigmoid(step)
        step = softplus(step)
    low, high = tl.full([], K.LOW, K.ACC), tl.full([], K.HIGH, K.ACC)
    slope = tl.where(inside(tile) & (step >= low) & (step <= high), slope, 0.0)
    return tl.where(inside(tile), clamp(step, K.LOW, K.HIGH), 0.0), slope


@triton.jit
def document(scan, tile, t):
    """The documents of tokens t of the tile's sequence; behind its end stands the last token's."""
    return tl.load(scan.seq_idx + tile.earlier + tl.minimum(t, tile.end - 1))


@triton.jit
def decays(log_decay, scan, tile, K):
    """Of a tile: the cumulative log decay [Q], from the entering state to each token [Q], from each
    token to the leaving state [Q], from the entering to the leaving state; and each token's
    document [Q]. All exponents are <= 0, and zero stands for another document."""
    cs = tl.cumsum(log_decay, 0)
    # the last token's own entry, not the sum: its decay to the leaving state is exactly 1
    last = tl.minimum(K.Q, tile.end - tile.t0) - 1
    total = tl.sum(tl.where(tile.q == last, cs, 0.0), 0)
    entry, exit, whole = tl.exp(cs), tl.exp(tl.minimum(total - cs, 0.0)), tl.exp(total)
    doc = tile.q * 0
    if scan.seq_idx is not None:
        doc = document(scan, tile, tile.t0 + tile.q)
        entering = document(scan, tile, tl.maximum(tile.t0 - 1, tile.start))
        leaving = document(scan, tile, tile.t0 + last)
        entry = tl.where(doc == entering, entry, 0.0)
        exit = tl.where(doc == leaving, exit, 0.0)
        whole = tl.where(entering == leaving, whole, 0.0)
    return cs, entry, exit, whole, doc


# Sequences, segments and their states


@triton.jit
def sequence(scan, seq, length, q):
    """The first tile of sequence `seq`."""
    row, start, end = seq, seq * 0, seq * 0 + length
    if scan.cu_seqlens is not None:
        row, start = seq * 0, tl.load(scan.cu_seqlens + seq).to(tl.int32)
        end = tl.load(scan.cu_seqlens + seq + 1).to(tl.int32)
    return Tile(row, row.to(tl.int64) * length, start, end, start, q)


@triton.jit
def segment(seg, tokens, SEGMENTS: tl.constexpr, Q: tl.constexpr):
    """The first tile and the end of tiles of a segment: equal numbers of tiles, the last fewer."""
    tiles = tl.cdiv(tokens, Q)
    each = tl.cdiv(tiles, SEGMENTS)
    return tl.minimum(seg * each, tiles), tl.minimum(seg * each + each, tiles)


@triton.jit
def slot_of(scan, seq, start, length, CHUNK: tl.constexpr):
    """Where the chunks of a sequence begin in an array of all; packed sequences leave gaps."""
    return seq * tl.cdiv(length, CHUNK) if scan.cu_seqlens is None else start // CHUNK + seq


@triton.jit
def owned(pid, heads, SEGMENTS: tl.constexpr, K):
    """What a program of a sweep owns: channels p of a head [PS], a segment, a sequence."""
    SLICES: tl.constexpr = K.P2 // K.PS
    p = pid % SLICES * K.PS + tl.arange(0, K.PS)
    rest = pid // (SLICES * heads)
    return p, pid // SLICES % heads, rest % SEGMENTS, rest // SEGMENTS


@triton.jit
def state_at(states, index, head, heads, p, n, K):  # [PS, N2]
    """Pointers and mask of one head's state in a contiguous (index, head, P, N)."""
    base = states + (index.to(tl.int64) * heads + head) * (K.P * K.N)
    return base + p[:, None] * K.N + n[None, :], (p < K.P)[:, None] & (n < K.N)[None, :]


@triton.jit
def load_state(states, index, head, heads, p, n, K):
    pointers, mask = state_at(states, index, head, heads, p, n, K)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_state(S, states, index, head, heads, p, n, K):
    pointers, mask = state_at(states, index, head, heads, p, n, K)
    tl.store(pointers, S.to(states.dtype.element_ty), mask=mask)


@triton.jit
def entering(
    states, seq, ends, whole, first, count, head, heads, p, n, K,
    SEGMENTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The state [PS, N2] with which a sequence begins, if any, after `count` segments from the
    index `first` on, forwards (STEP 1) or backwards (STEP -1)."""
    S = tl.zeros([K.PS, K.N2], K.ACC)
    if states is not None:
        S += load_state(states, seq, head, heads, p, n, K).to(K.ACC)
    if SEGMENTS > 1:
        for k in range(count):
            i = first + k * STEP
            decay = tl.load(whole + i * heads + head)
            S = S * decay + load_state(ends, i, head, heads, p, n, K)
    return S


# Launch configurations


class Config(NamedTuple):
    tile: int  # Q
    p_slice: int  # most channels of a head that one program handles
    warps: int
    stages: int
    chunk: int = 0


@cache
def device(place: torch.device) -> tuple[str, int]:
    """Its family ("sm_80", "sm_90", ..., "gfx942") and its number of multiprocessors."""
    if place.type != "cuda":
        return "interpreter", 1
    about = torch.cuda.get_device_properties(place)
    family = getattr(about, "gcnArchName", "").split(":")[0] or f"sm_{about.major}{about.minor}"
    return family, about.multi_processor_count


# (kernel, bytes of a factor of its products, size[, family]) -> configuration; a state above 128 is
# wide, a head below 64 narrow, and what has no line of its own is usual.
#
# `forward` and `states` carry a state of p_slice x N2 numbers in registers, `gradients` a sum of
# tile x N2 and two of tile x chunk. Registers decide. Head size 64 in bfloat16 spills nothing on
# sm_80 and sm_90, but for 8 bytes a thread of `gradients` on sm_80 at state size 128: a chunk of 64
# would spare these, but write and read 512 bytes of states more per token and head. Where a head is
# no wider than a tile, Triton lays all warps along the tile, and each holds a chunk's whole width.
TABLE = {
    ("forward", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=2),
    ("states", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=2),
    ("gradients", 2, "usual"): Config(tile=32, p_slice=64, warps=8, stages=1, chunk=128),
    ("gradients", 2, "narrow"): Config(tile=16, p_slice=64, warps=4, stages=1, chunk=32),
    ("forward", 2, "wide"): Config(tile=32, p_slice=32, warps=8, stages=2),
    ("states", 2, "wide"): Config(tile=32, p_slice=32, warps=4, stages=2),
    ("gradients", 2, "wide"): Config(tile=16, p_slice=32, warps=8, stages=1, chunk=64),
    ("forward", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=2),
    ("states", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=2),
    ("gradients", 4, "usual"): Config(tile=16, p_slice=64, warps=8, stages=1, chunk=32),
    ("forward", 4, "wide"): Config(tile=16, p_slice=32, warps=8, stages=1),
    ("states", 4, "wide"): Config(tile=16, p_slice=32, warps=8, stages=1),
    ("gradients", 4, "wide"): Config(tile=16, p_slice=16, warps=8, stages=1, chunk=16),
    ("forward", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("states", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("gradients", 8, "usual"): Config(tile=16, p_slice=16, warps=8, stages=1, chunk=16),
    # four waves of 64 lanes may have 512 registers each, eight 256
    ("gradients", 2, "usual", "gfx942"): Config(tile=32, p_slice=64, warps=4, stages=1, chunk=128),
}


def launch(kind: str, family: str, K: Constants) -> tuple[Constants, dict]:
    """Of a kernel: its argument K, and the options of its launch."""
    size = "wide" if K.N2 > 128 else "narrow" if K.P2 < 64 else "usual"
    key = (kind, K.DOT.primitive_bitwidth // 8, size)
    config = TABLE.get((*key, family)) or TABLE.get(key) or TABLE[(*key[:2], "usual")]
    chosen = {"Q": config.tile, "CHUNK": config.chunk, "PS": min(config.p_slice, K.P2)}
    options = {"num_warps": config.warps, "num_stages": config.stages, **ROUND_ONCE}
    return K._replace(**chosen), options


def static(K: Constants) -> Constants:
    """K as a kernel takes it."""
    return Constants(*map(tl.constexpr, K))


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
