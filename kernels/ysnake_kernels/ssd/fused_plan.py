"""How the fused kernels are launched: constants, strides, the table of configurations, segments.

These functions run on the host before a launch. docs/kernels.md defines chunk, tile, slice and
segment.
"""

from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from ysnake_kernels.numerics import ceil_divide, common_unit, next_power_of_2
from ysnake_kernels.ssd.inputs import DIFFERENTIABLE, ScanInputs
from ysnake_kernels.triton_products import arithmetic, tf32_is_allowed

LARGEST = 256  # of head sizes and state sizes
MOST_SEGMENTS = 32
SHORTEST_SEGMENT = 512  # tokens; shorter ones spend their time on the states between them


class Constants(NamedTuple):
    """What a kernel is compiled with: its argument `K`."""

    P: int  # channels of a head
    N: int  # size of the state
    P2: int  # P and N padded to powers of two
    N2: int
    HEADS: int
    PER_GROUP: int  # heads of a group
    UNIT: int  # divides the strides of tokens that a kernel gets
    D_PER_CHANNEL: bool
    SOFTPLUS: bool
    LOW: float
    HIGH: float
    ACC: tl.dtype  # of sums, exponents and states
    DOT: tl.dtype  # of the factors of products
    PRECISION: str
    Q: int = 0  # tokens of a tile; this and the next two come from TABLE
    CHUNK: int = 0  # tokens of a chunk
    PS: int = 0  # channels of a slice


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def side_by_side(t: MaybeTensor) -> MaybeTensor:
    """t (batch, length, ...) in the layout that kernels read; a copy where it has another.

    All numbers of a token lie side by side, and the rows of the batch at equal distances. The
    stride of a token is limited, since kernels count in 32 bits within a tile.
    """
    if t is None:
        return t
    shape: tuple[int, ...] = t.shape
    stride = t.stride()
    fits = token_stride(t) < 2**22
    fits &= shape[0] == 1 or shape[1] == 1 or stride[0] == shape[1] * stride[1]
    if stride[2:] != ((*shape[3:], 1) if len(shape) == 4 else (1,)):
        expected = 1  # the stride of a dimension of size 1 does not matter
        for i in range(len(shape) - 1, 1, -1):
            fits &= shape[i] == 1 or stride[i] == expected
            expected *= shape[i]
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def token_stride(t: Tensor) -> int:
    """From a token to the next, in the same row of the batch or at the start of the next row.

    torch gives a length of 1 any stride. Then each row has one token, and rows are what counts.
    """
    return t.stride(1 if t.shape[1] > 1 else 0)


def strides(*tensors: Tensor | None) -> tuple[int, list[int]]:
    """The largest unit up to 16 that divides all strides of tokens, and the strides in the unit."""
    values = [0 if t is None else token_stride(t) for t in tensors]
    unit = common_unit(*values)
    return unit, [v // unit for v in values]


def constants(inputs: ScanInputs, unit: int, family: str) -> Constants:
    """The constants that follow from the inputs, without a tile, chunk and slice.

    `unit` is that of the strides, `family` that of the device.
    """
    x, dt, A, B, C, D, z, initial_states, dt_bias = inputs[:DIFFERENTIABLE]
    tensors = x, B, C, dt, A, D, z, initial_states, dt_bias
    dtypes = [None if t is None else t.dtype for t in tensors]
    exact = torch.float32 in dtypes[:3] or torch.float16 in dtypes[:3]
    numbers = arithmetic(family, exact and tf32_is_allowed(), *dtypes)
    sizes = *x.shape[2:], *B.shape[2:]
    per_channel = D is not None and D.ndim == 2
    steps = inputs.dt_softplus, *inputs.dt_limit
    return _constants(*sizes, unit, per_channel, *steps, *numbers)


@cache
def _constants(heads: int, P: int, groups: int, N: int, *others: Any) -> Constants:
    return Constants(P, N, padded_size(P), padded_size(N), heads, heads // groups, *others)


def padded_size(size: int) -> int:
    """The next power of two. It is at least 16, the least that a matrix product takes."""
    return max(16, next_power_of_2(size))


def slots(sequences: int, batch: int, length: int, packed: bool, chunk: int) -> int:
    """The length of an array with a place for each chunk of all sequences."""
    return length // chunk + sequences if packed else batch * ceil_divide(length, chunk)


# Launch configurations


class Config(NamedTuple):
    tile: int  # Q
    p_slice: int  # the most channels of a head that one program computes
    warps: int
    stages: int
    chunk: int = 0  # on the line for "states": tokens between two states that backward stores


# (kernel, bytes of a number in its products, size[, family]) -> configuration. The size is "wide"
# for states above 128. A kernel without a line for "wide" uses the one for "usual".
#
# Registers are the limit. `forward` and `states` hold a state of p_slice x N2 numbers in them,
# `rows` and `columns` a sum of tile x N2 numbers and two of tile x chunk.
TABLE = {
    ("forward", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=3),
    ("states", 2, "usual"): Config(tile=64, p_slice=64, warps=4, stages=2, chunk=64),
    ("rows", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=1),
    ("columns", 2, "usual"): Config(tile=32, p_slice=64, warps=4, stages=1),
    # The fastest on an H200, and used on an H100 too. Rows and columns spill registers to memory
    # there, but two programs share a multiprocessor.
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
    """A kernel's argument K with tile, chunk and slice, and the kernel's line of the table.

    `chunk` is the tokens of a chunk; 0 means that a chunk is one tile.
    """
    config = line_of(kind, family, K)
    return in_chunks(K, config, chunk or config.tile), config


def line_of(kind: str, family: str, K: Constants) -> Config:
    """A kernel's line of the table."""
    size = "wide" if K.N2 > 128 else "usual"
    return TABLE[table_key(kind, K.DOT.primitive_bitwidth // 8, size, family)]


def in_chunks(K: Constants, config: Config, chunk: int) -> Constants:
    """K with the tile and slice of a line of the table, and chunks of `chunk` tokens."""
    return in_tiles(K, config.tile, chunk, min(config.p_slice, K.P2))


def table_key(kind: str, item: int, size: str, family: str) -> tuple:
    """The key of a kernel's line: that of the family if there is one, else the size, else usual."""
    keys = (kind, item, size, family), (kind, item, size), (kind, item, "usual")
    return next(key for key in keys if key in TABLE)


@cache
def in_tiles(K: Constants, tile: int, chunk: int, p_slice: int) -> Constants:
    return K._replace(Q=tile, CHUNK=chunk, PS=p_slice)


def segments(sequences: int, heads: int, slices: int, tokens: int, multiprocessors: int) -> int:
    """Into how many segments a sweep cuts each sequence; 1 where the programs fill the GPU anyway.

    `tokens` counts the tokens of all sequences. A sweep in segments reads its inputs twice, so two
    segments would gain nothing.
    """
    programs = sequences * heads * slices
    if not 0 < programs < multiprocessors:
        return 1
    wanted = 2 * multiprocessors // programs
    count = min(wanted, tokens // sequences // SHORTEST_SEGMENT, MOST_SEGMENTS)
    return count if count > 2 else 1
