"""What the fused kernels share: how they see tensors, sequences and segments, the arithmetic of one
tile of tokens, and the table of launch configurations.

A tile is Q tokens of one sequence. P is the head size and N the state size; P2 and N2 are these
padded to powers of two. A program handles PS of the P2 channels of a head, a slice.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.triton_math import clamp, softplus

LARGEST = 256  # head size and state size
MOST_SEGMENTS = 32
SHORTEST_SEGMENT = 512  # tokens; shorter ones spend their time on the states between them

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class View(NamedTuple):
    """A tensor (batch, token, head or group[, channel]) and its strides, as a kernel reads it."""

    data: Tensor
    batch: int
    token: int
    head: int
    channel: int


def view(t: Tensor | None) -> View | None:
    """Any strides; dt has no channels."""
    return None if t is None else View(t, *t.stride(), *([0] * (4 - t.ndim)))


# One tile


@triton.jit
def at(v, row, token, head):
    """Pointer to a token of a head; all three may be far apart, so in 64 bits."""
    offset = row.to(tl.int64) * v.batch + token.to(tl.int64) * v.token
    return v.data + offset + head.to(tl.int64) * v.head


@triton.jit
def load_tile(v, row, t0, head, q, end, c, WIDTH: tl.constexpr):  # [Q, C]
    """Channels c of the tokens t0 + q, zero outside the sequence."""
    offsets = q[:, None] * v.token + c[None, :] * v.channel
    mask = (t0 + q < end)[:, None] & (c < WIDTH)[None, :]
    return tl.load(at(v, row, t0, head) + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(v, row, t0, head, q, end, c, tile, WIDTH: tl.constexpr):
    offsets = q[:, None] * v.token + c[None, :] * v.channel
    mask = (t0 + q < end)[:, None] & (c < WIDTH)[None, :]
    tl.store(at(v, row, t0, head) + offsets, tile.to(v.data.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr, acc=None):
    """acc + a b, operands rounded to DOT, summed in float32 (float64 for float64)."""
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED and tl.bfloat16 == DOT:  # the interpreter multiplies the bits of a bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if tl.float64 == DOT:
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sigmoid(v):
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1.0 + e)


@triton.jit
def step_sizes(
    dt, dt_bias, row, t0, head, q, end,
    ACC: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """clamp(softplus(dt + dt_bias)) and its derivative, [Q] each, zero outside the sequence."""
    inside = t0 + q < end
    step = tl.load(at(dt, row, t0, head) + q * dt.token, mask=inside, other=0.0).to(ACC)
    if dt_bias is not None:
        step += tl.load(dt_bias + head).to(ACC)
    slope = tl.full(q.shape, 1.0, ACC)
    if SOFTPLUS:
        slope = sigmoid(step)
        step = softplus(step)
    low, high = tl.full([], LOW, ACC), tl.full([], HIGH, ACC)
    slope = tl.where(inside & (step >= low) & (step <= high), slope, 0.0)
    return tl.where(inside, clamp(step, LOW, HIGH), 0.0), slope


@triton.jit
def decays(log_decay, seq_idx, row, length, t0, q, start, end, Q: tl.constexpr):
    """Of a tile: the cumulative log decay [Q], from the entering state to each token [Q], from each
    token to the leaving state [Q], from the entering to the leaving state; and each token's
    document [Q]. All exponents are <= 0, and zero stands for another document."""
    cs = tl.cumsum(log_decay, 0)
    # the last token's own entry, not the sum: its decay to the leaving state is exactly 1
    total = tl.sum(tl.where(q == tl.minimum(Q, end - t0) - 1, cs, 0.0), 0)
    entry, exit, whole = tl.exp(cs), tl.exp(tl.minimum(total - cs, 0.0)), tl.exp(total)
    doc = q * 0
    if seq_idx is not None:
        docs = seq_idx + row.to(tl.int64) * length
        doc = tl.load(docs + tl.minimum(t0 + q, end - 1))
        before = tl.load(docs + tl.maximum(t0 - 1, start))
        last = tl.load(docs + tl.minimum(t0 + Q, end) - 1)
        entry = tl.where(doc == before, entry, 0.0)
        exit = tl.where(doc == last, exit, 0.0)
        whole = tl.where(before == last, whole, 0.0)
    return cs, entry, exit, whole, doc


# Sequences and segments


@triton.jit
def sequence(seq, length, cu_seqlens):
    """The row of the batch, the first token and the end of sequence `seq`."""
    if cu_seqlens is None:
        row, start, end = seq, seq * 0, seq * 0 + length
    else:
        row, start = seq * 0, tl.load(cu_seqlens + seq).to(tl.int32)
        end = tl.load(cu_seqlens + seq + 1).to(tl.int32)
    return row, start, end


@triton.jit
def segment(seg, start, end, SEGMENTS: tl.constexpr, Q: tl.constexpr):
    """The first tile and the end of tiles of a segment: equal numbers of tiles, the last fewer."""
    tiles = tl.cdiv(end - start, Q)
    each = tl.cdiv(tiles, SEGMENTS)
    return tl.minimum(seg * each, tiles), tl.minimum(seg * each + each, tiles)


@triton.jit
def slot_of(seq, start, length, cu_seqlens, Q: tl.constexpr):
    """Where the tiles of a sequence begin in an array of all tiles; packed sequences leave gaps."""
    return seq * tl.cdiv(length, Q) if cu_seqlens is None else start // Q + seq


@triton.jit
def state_at(states, index, head, heads, p, n, P: tl.constexpr, N: tl.constexpr):  # [PS, N2]
    """Pointers and mask of one head's state in a contiguous (index, head, P, N)."""
    base = states + (index.to(tl.int64) * heads + head) * (P * N)
    return base + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]


@triton.jit
def load_state(states, index, head, heads, p, n, P: tl.constexpr, N: tl.constexpr):
    pointers, mask = state_at(states, index, head, heads, p, n, P, N)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_state(S, states, index, head, heads, p, n, P: tl.constexpr, N: tl.constexpr):
    pointers, mask = state_at(states, index, head, heads, p, n, P, N)
    tl.store(pointers, S.to(states.dtype.element_ty), mask=mask)


@triton.jit
def combine(
    S, ends, whole, index, behind, count, STEP: tl.constexpr, head, heads, p, n,
    P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The state S [PS, N2] after `count` segments from `index` on, forwards or backwards; the ends
    of the backward direction lie `behind` the others."""
    for k in range(count):
        i = index + k * STEP
        end = load_state(ends, i + behind, head, heads, p, n, P, N)
        S = S * tl.load(whole + i * heads + head) + end
    return S


# What the kernels of a backward tell each other about each token: (plane, batch, head, length)

STEP = tl.constexpr(0)  # dt after bias, softplus and limits
DECAY = tl.constexpr(1)  # log decay from the chunk's start to the token
INTO = tl.constexpr(2)  # flow into a token from all before it
SENT = tl.constexpr(3)  # flow from a token to those after it in its chunk
ONWARD = tl.constexpr(4)  # flow from a token to the leaving state
DSTEP = tl.constexpr(5)  # gradient of step but for its part in the decay


@triton.jit
def plane(scratch, INDEX: tl.constexpr, row, batch, head, heads, length):
    """Pointer to token 0 of a head."""
    return scratch + ((row + batch * INDEX).to(tl.int64) * heads + head) * length


@triton.jit
def load_plane(scratch, INDEX: tl.constexpr, row, batch, head, heads, length, t, end):
    at_token = plane(scratch, INDEX, row, batch, head, heads, length) + t
    return tl.load(at_token, mask=t < end, other=0.0)


@triton.jit
def store_plane(v, scratch, INDEX: tl.constexpr, row, batch, head, heads, length, t, end):
    tl.store(plane(scratch, INDEX, row, batch, head, heads, length) + t, v, mask=t < end)


# Launch configurations


class Config(NamedTuple):
    tile: int  # Q
    p_slice: int  # most channels of a head that one program handles
    warps: int
    stages: int
    chunk: int = 0


class Device(NamedTuple):
    family: str  # "sm_80", "sm_90", ..., "gfx942"
    multiprocessors: int


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    family = getattr(properties, "gcnArchName", "").split(":")[0]
    return Device(
        family or f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
    )


def device(x: Tensor) -> Device:
    """What the table and the rules need to know of x's device."""
    return _device(x.device.index) if x.is_cuda else Device("interpreter", 1)


def arithmetic(*tensors: Tensor | None) -> dict:
    """Accumulator, dtype and precision of matrix products, as the kernels take them."""
    dtypes = {t.dtype for t in tensors if t is not None}
    products = {t.dtype for t in tensors[:3]}  # x, B, C
    if torch.float64 in dtypes:
        return {"ACC": tl.float64, "DOT": tl.float64, "PRECISION": "ieee"}
    if products == {torch.bfloat16}:
        return {"ACC": tl.float32, "DOT": tl.bfloat16, "PRECISION": "ieee"}
    # tf32 holds every float16 and, unlike it, states and gradients of any size
    fast = products == {torch.float16} or torch.get_float32_matmul_precision() != "highest"
    return {"ACC": tl.float32, "DOT": tl.float32, "PRECISION": "tf32" if fast else "ieee"}


def constants(x: Tensor, B: Tensor, numbers: dict, softplus: bool, low: float, high: float) -> dict:
    """The compile-time arguments that all kernels of one call share."""
    P, N = x.shape[3], B.shape[3]
    padded = {"P2": max(16, triton.next_power_of_2(P)), "N2": max(16, triton.next_power_of_2(N))}
    options = {"SOFTPLUS": softplus, "LOW": low, "HIGH": high}
    return {"P": P, "N": N, **padded, **numbers, **options}


# (kernel, bytes of a factor of its products, whether the state size is above 128) -> configuration.
#
# `forward` and `states` carry a state of p_slice x N2 numbers in registers, `gradients` a sum of
# tile x N2 and two of tile x chunk. Registers decide. On sm_80 and sm_90, head size 64 in bfloat16
# spills nothing but 8 and 24 bytes a thread in `gradients` at state size 128: a chunk of 64 would
# spare these, but write and read 512 bytes of states more per token and head.
TABLE = {
    ("forward", 2, False): Config(tile=32, p_slice=64, warps=4, stages=2),
    ("states", 2, False): Config(tile=32, p_slice=64, warps=4, stages=2),
    ("gradients", 2, False): Config(tile=32, p_slice=64, warps=8, stages=1, chunk=128),
    ("forward", 2, True): Config(tile=32, p_slice=32, warps=8, stages=2),
    ("states", 2, True): Config(tile=32, p_slice=32, warps=4, stages=2),
    ("gradients", 2, True): Config(tile=16, p_slice=32, warps=8, stages=1, chunk=64),
    ("forward", 4, False): Config(tile=16, p_slice=64, warps=8, stages=2),
    ("states", 4, False): Config(tile=16, p_slice=64, warps=8, stages=2),
    ("gradients", 4, False): Config(tile=16, p_slice=64, warps=8, stages=1, chunk=32),
    ("forward", 4, True): Config(tile=16, p_slice=32, warps=8, stages=1),
    ("states", 4, True): Config(tile=16, p_slice=32, warps=8, stages=1),
    ("gradients", 4, True): Config(tile=16, p_slice=16, warps=8, stages=1, chunk=16),
    ("forward", 8, False): Config(tile=16, p_slice=16, warps=4, stages=1),
    ("states", 8, False): Config(tile=16, p_slice=16, warps=4, stages=1),
    ("gradients", 8, False): Config(tile=16, p_slice=16, warps=8, stages=1, chunk=16),
    ("forward", 8, True): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("states", 8, True): Config(tile=16, p_slice=16, warps=8, stages=1),
    ("gradients", 8, True): Config(tile=16, p_slice=16, warps=8, stages=1, chunk=16),
}


# Where an architecture needs another: (family, *key of TABLE) -> configuration.
EXCEPTIONS: dict[tuple, Config] = {}


def launch(kind: str, family: str, given: dict) -> dict:
    """The configuration of a kernel, as arguments of its launch."""
    key = (kind, given["DOT"].primitive_bitwidth // 8, given["N2"] > 128)
    config = EXCEPTIONS.get((family, *key), TABLE[key])
    return {
        "Q": config.tile,
        "CHUNK": config.chunk or config.tile,
        "PS": min(config.p_slice, given["P2"]),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def segments(sequences: int, heads: int, slices: int, length: int, multiprocessors: int) -> int:
    """Into how many segments a sweep cuts each sequence: one where the programs fill the GPU.

    A segmented sweep reads its inputs twice, so two segments gain nothing.
    """
    programs = sequences * heads * slices
    if programs >= multiprocessors:
        return 1
    wanted = 2 * multiprocessors // programs
    count = min(wanted, length // sequences // SHORTEST_SEGMENT, MOST_SEGMENTS)
    return count if count > 2 else 1
