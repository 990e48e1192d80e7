"""The arithmetic of the eager scan on the chunks of a piece, shared by forward and backward.

docs/kernels.md explains the symbols ("In pure torch"), `eager_layout` the letters of the shapes.
All exponents are at most zero. Factors between tokens of different documents are zero.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ysnake_kernels.numerics import SMALLEST_LOG_DECAY, sums_of_log_decays
from ysnake_kernels.ssd.eager_layout import Layout
from ysnake_kernels.ssd.inputs import ScanInputs


class Buffer:
    """Uninitialised memory for one temporary tensor. Each piece overwrites the piece before."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.memory: Tensor | None = None
        self.views: dict[tuple[int, ...], Tensor] = {}

    def shaped(self, *shape: int) -> Tensor:
        """The memory in this shape. It is allocated anew where it is too small."""
        if shape not in self.views:
            size = math.prod(shape)
            if self.memory is None or self.memory.numel() < size:
                self.memory = torch.empty(size, dtype=self.dtype, device=self.device)
                self.views = {}
            self.views[shape] = self.memory[:size].view(shape)
        return self.views[shape]


class Buffers:
    """The memory that the pieces of a scan share, named after what it holds."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        new = partial(Buffer, dtype, device)
        self.y, self.L, self.W, self.V = new(), new(), new(), new()
        self.dW, self.dCS = new(), new()
        self.within = new()  # W x, and in backward W^T G
        self.products = new()  # numbers that are summed next


@dataclass
class Piece:
    """Consecutive chunks that are computed as one batch."""

    chunks: range  # their numbers
    tokens: slice
    x: Tensor  # [k b q r p]
    B: Tensor  # [(k b) q n]
    C: Tensor  # [(k b) q n]
    cs: Tensor  # [k b r q] sums of the log decays from the chunk's start
    dt: Tensor  # [k b r q] the step sizes
    entry: Tensor  # [k b q r] exp(cs_i), from the entering state to token i
    exit: Tensor  # [k b q r] exp(cs_last - cs_j) dt_j, from token j to the leaving state
    whole: Tensor  # [k b r] exp(cs_last), from the entering to the leaving state
    documents: Tensor | None  # [k b q]


class PreparedScan:
    """The inputs of a scan, cut into pieces, with the decays of all chunks.

    The decays, one number for a token and head, are computed for all chunks at once, since small
    operations add up. For this the last chunk is filled up with tokens whose step size is zero.
    """

    def __init__(self, inputs: ScanInputs, dt: Tensor, log_decays: Tensor):
        self.layout = layout = Layout(inputs)
        self.dtype, self.device = dt.dtype, dt.device
        self.buffers = Buffers(self.dtype, self.device)
        self.D_of_heads: Tensor | None = None  # [b r 1], is added to the diagonal of W
        self.D_of_channels: Tensor | None = None  # [b 1 r p], multiplies x
        if inputs.D is not None:
            D = layout.by_group(inputs.D.to(self.dtype))
            if D.shape[3] == 1:
                self.D_of_heads = D.transpose(1, 2)[..., 0]
            else:
                self.D_of_channels = D
        self.x = layout.by_piece(inputs.x)
        self.B, self.C = (self._by_piece(t) for t in (inputs.B, inputs.C))
        self._decays(layout.by_chunk(dt), layout.by_chunk(log_decays), inputs.seq_idx)

    def _by_piece(self, t: Tensor) -> list[Tensor]:
        """[batch length g n] -> for each piece [(k b) q n]."""
        layout = self.layout
        chunks = layout.by_chunk(t.to(self.dtype).flatten(2))  # [chunk b q n]
        return [part.flatten(0, 1) for part in layout.split(chunks)]

    def _decays(self, dt: Tensor, log_decays: Tensor, seq_idx: Tensor | None) -> None:
        """entry, exit and whole of all chunks [chunk b q r], and the numbers of each piece."""
        layout = self.layout
        cs = sums_of_log_decays(log_decays, 2)
        self.entry = cs.clamp(min=SMALLEST_LOG_DECAY).exp_()
        self.exit = (cs[:, :, -1:] - cs).clamp_(min=SMALLEST_LOG_DECAY).exp_().mul_(dt)
        self.whole = self.entry[:, :, -1]  # [chunk b r]
        documents: list[Tensor] | list[None] = [None] * len(layout.pieces)
        if seq_idx is not None:
            by_group = seq_idx[..., None].expand(-1, -1, layout.groups)
            ids = layout.by_chunk(by_group, repeat_last=True)  # [chunk b q 1]
            before = torch.cat([ids[:1, :, :1], ids[:-1, :, -1:]])  # of the token before a chunk
            self.entry = self.entry * (ids == before)
            self.exit = self.exit * (ids == ids[:, :, -1:])
            self.whole = self.whole * (ids[:, :, -1] == before[:, :, 0])
            documents = layout.split(ids[..., 0])
        rows = (layout.split(t.transpose(2, 3).contiguous(), 3) for t in (cs, dt))
        edges = (layout.split(t) for t in (self.entry, self.exit))
        whole = self.whole.split(layout.counts)
        self.numbers = list(zip(*rows, *edges, whole, documents, strict=True))

    def piece(self, number: int) -> Piece:
        chunks = self.layout.pieces[number]
        x = self.layout.fold(self.x[number].to(self.dtype))
        tensors = (x, self.B[number], self.C[number], *self.numbers[number])
        return Piece(chunks, self.layout.tokens(chunks), *tensors)

    def fold_state(self, state: Tensor | None) -> Tensor | None:
        """[batch (g r) p n] -> [b (r p) n]."""
        return None if state is None else self.layout.fold_state(state.to(self.dtype))

    def empty_states(self) -> Tensor:
        """Memory for the state that enters each chunk and the one that leaves the last."""
        layout = self.layout
        shape = (layout.n_chunks + 1, layout.b, layout.r * layout.p, layout.n)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class EdgeStates:
    """Memory for the states, or their gradients, at the edges of the chunks of one piece.

    The next piece uses it again. One state is known: the one that enters the first chunk, or the
    one that leaves the last; None means that it is zero. The caller writes the others.

    The methods return the states that enter the chunks and those that leave them, [k b (r p) n]. A
    state that leaves one chunk and enters the next is in both, in the same memory. If the piece has
    one chunk, the known state is not copied.
    """

    def __init__(self, scan: PreparedScan):
        layout, new = scan.layout, partial(Buffer, scan.dtype, scan.device)
        self.sizes = layout.b, layout.r * layout.p, layout.n
        self.several = new()
        self.one = new(), new()  # used in turns: the known state may be in the other

    def after(self, entering: Tensor | None, chunks: range) -> tuple[Tensor | None, Tensor]:
        """For chunks of which the first entering state is known."""
        if len(chunks) == 1:
            return None if entering is None else entering[None], self._of_one(chunks)
        states = self.several.shaped(len(chunks) + 1, *self.sizes)
        states[0] = 0 if entering is None else entering
        return states[:-1], states[1:]

    def before(self, leaving: Tensor | None, chunks: range) -> tuple[Tensor, Tensor | None]:
        """For chunks of which the last leaving state is known."""
        if len(chunks) == 1:
            return self._of_one(chunks), None if leaving is None else leaving[None]
        states = self.several.shaped(len(chunks) + 1, *self.sizes)
        states[-1] = 0 if leaving is None else leaving
        return states[:-1], states[1:]

    def _of_one(self, chunks: range) -> Tensor:
        return self.one[chunks.start % 2].shaped(1, *self.sizes)


def select(states: Tensor, chunks: range, from_a_state: bool) -> tuple[Tensor | None, Tensor]:
    """Out of the states at all edges: those that enter a piece's chunks, and those that leave them.

    The entering states are None for the first piece, unless the sequence starts `from_a_state`.
    """
    entering = states[chunks.start : chunks.stop] if chunks.start or from_a_state else None
    return entering, states[chunks.start + 1 : chunks.stop + 1]


# Inside the chunks: y_i = sum_j W_ij x_j


def decay_matrix(scan: PreparedScan, piece: Piece) -> Tensor:
    """L_ij = exp(cs_i - cs_j) dt_j, and dt_j where j > i; [k b r i j]."""
    L = scan.buffers.L.shaped(*piece.cs.shape, piece.cs.shape[3])
    torch.sub(piece.cs[..., :, None], piece.cs[..., None, :], out=L)
    return L.clamp_(SMALLEST_LOG_DECAY, 0).exp_().mul_(piece.dt[..., None, :])


def scores(piece: Piece) -> Tensor:
    """CB_ij = C_i . B_j, zero where token i does not depend on token j; [k b 1 i j]."""
    CB = torch.bmm(piece.C, piece.B.transpose(1, 2))
    return mask(piece, CB.unflatten(0, piece.x.shape[:2]))[:, :, None]


def mask(piece: Piece, t: Tensor) -> Tensor:
    """t [k b i j], made zero where token j is later than i or in another document."""
    t.tril_()
    if piece.documents is not None:
        t.mul_(piece.documents[..., :, None] == piece.documents[..., None, :])
    return t


def weights(scan: PreparedScan, L: Tensor, CB: Tensor, out: Tensor) -> Tensor:
    """W_ij = CB_ij L_ij, plus D of the head where i = j; [k b r i j]."""
    W = torch.mul(L, CB, out=out)
    if scan.D_of_heads is not None:
        W.diagonal(dim1=3, dim2=4).add_(scan.D_of_heads)
    return W


def outputs(
    scan: PreparedScan, piece: Piece, W: Tensor, CS: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """y before the gate, W x + entry C S + D x, [batch (k q) heads p].

    A D of heads is part of W already. If `out` is None, the next piece overwrites the result.
    """
    layout, (k, _, q) = scan.layout, piece.x.shape[:3]
    if out is None:
        out = scan.buffers.y.shaped(layout.batch, k * q, layout.heads, layout.p)
    y = multiply_heads(scan.buffers.within, W, piece.x.transpose(2, 3)).transpose(2, 3)
    if scan.D_of_channels is not None:
        y.addcmul_(piece.x, scan.D_of_channels)
    write(layout, layout.cut(out, k), y, CS, piece.entry)
    return out


# Across the edges: y_i += entry_i C_i S, and S' = whole S + sum_j V_j B_j


def read_states(piece: Piece, states: Tensor | None) -> Tensor | None:
    """C S of the entering states, [k b q r p]; None if these are zeros."""
    if states is None:
        return None
    return torch.bmm(piece.C, states.flatten(0, 1).transpose(1, 2)).view(piece.x.shape)


def weighted_x(scan: PreparedScan, piece: Piece) -> Tensor:
    """V_j = exit_j x_j, [(k b) q (r p)]."""
    V = scan.buffers.V.shaped(*piece.x.shape)
    torch.mul(piece.x, piece.exit[..., None], out=V)
    return scan.layout.merge_heads(V)


def advance(scan: PreparedScan, piece: Piece, entering: Tensor | None, leaving: Tensor) -> None:
    """Write the leaving states. The entering states after the first are views of them."""
    V = weighted_x(scan, piece)
    torch.bmm(V.transpose(1, 2), piece.B, out=leaving.flatten(0, 1))
    if entering is not None:
        add_decayed(scan.layout, entering[0], piece.whole[0], leaving[0])
    for c in range(1, len(leaving)):
        add_decayed(scan.layout, leaving[c - 1], piece.whole[c], leaving[c])


def add_decayed(layout: Layout, state: Tensor, whole: Tensor, to: Tensor) -> None:
    """Add whole S to another state; both [b (r p) n], whole [b r]."""
    layout.by_head(to).addcmul_(layout.by_head(state), whole[..., None])


# Products and sums


def multiply_heads(buffer: Buffer, left: Tensor, right: Tensor) -> Tensor:
    """The products [i m] x [m j] of all heads: left [k b r i m], right [k b r m j]."""
    out = buffer.shaped(*left.shape[:4], right.shape[4])
    for factors in zip(*(_matrices(t) for t in (left, right, out)), strict=True):
        torch.bmm(*factors[:2], out=factors[2])
    return out


def _matrices(t: Tensor) -> list[Tensor]:
    """[k b r i j] -> all its [r i j]."""
    return [matrices for chunk in t.unbind() for matrices in chunk.unbind()]


def multiply(scan: PreparedScan, a: Tensor, b: Tensor) -> Tensor:
    """The elementwise product, which the next call overwrites."""
    return torch.mul(a, b, out=scan.buffers.products.shaped(*a.shape))


def sum_products(scan: PreparedScan, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Sum a b over the last dimension, chunk by chunk, so that the products stay in the cache."""
    for a_chunk, b_chunk, out_chunk in zip(a, b, out, strict=True):
        torch.sum(multiply(scan, a_chunk, b_chunk), -1, out=out_chunk)


def write(
    layout: Layout,
    to: Tensor,
    values: Tensor,
    more: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """Write values + factors more, both [k b q r p], to a [k batch g q r p]; factors [k b q r]."""
    if more is None or factors is None:
        to.copy_(layout.unfold(values))
    else:
        terms = (layout.unfold(t) for t in (values, more, factors[..., None]))
        torch.addcmul(*terms, out=to)
