"""The SSD scan in pure torch: one sweep over chunks, forward, and one back, written by hand.

A sweep takes some chunks at a time, a piece: as many as stay in the cache. What a chunk does by
itself is done for all of a piece at once, and only the state goes from chunk to chunk. Heads of a
group share B and C: the products with the state are single matrix products over all heads of a
group. `forward` and `backward` hand over a piece's outputs while they are there, so that what
follows the scan, a gate here and the norm in the mixer, needs no sweep of its own. Symbols are
those of the paper (arXiv 2405.21060); k is the chunks of a piece, b batch times groups, q the
tokens of a chunk, r the heads of a group, p the head size, n the state size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.numerics import (
    SMALLEST_LOG_DECAY,
    finite_rates,
    log_decays,
    step_sizes,
    step_sizes_backward,
    sums_of_log_decays,
)
from ysnake_kernels.ssd.inputs import ScanInputs, SequenceGradients

CPU_CHUNK = 64  # 32 to 64 measured best on two cores, 128 and above lost
GPU_CHUNK = 128
PIECE_ELEMENTS = 768 * 1024  # of x in a piece of several chunks: three megabytes in float32
TINY = 1e-18  # of dt where a gradient is divided by it: as good as zero
FLOOR = SMALLEST_LOG_DECAY  # of an exponent; smaller numbers slow a CPU tenfold


@dataclass
class _Piece:
    """Some chunks in a row. No decay's exponent is above 0; zero stands for another document."""

    span: slice  # of the tokens
    x: Tensor  # [k b q r p]
    B: Tensor  # [(k b) q n]
    C: Tensor  # [(k b) q n]
    cs: Tensor  # [k b r q] sums of the log decays from the chunk's start
    dt: Tensor  # [k b r q]
    entry: Tensor  # [k b q r] exp(cs_i): from the entering state to token i
    exit: Tensor  # [k b q r] exp(cs_last - cs_j) dt_j: from token j to the leaving state
    whole: Tensor  # [k b r] exp(cs_last): from the entering to the leaving state
    seq: Tensor | None  # [k b q] the tokens' documents


class _Sweep:
    """The inputs folded by group and cut into pieces, with the buffers that the pieces share.

    What is one number for a token and head is there for all chunks at once, the last chunk filled
    up with tokens of size zero. The states that enter a piece's chunks, or leave them, are
    [k b (r p) n], None if all zeros.
    """

    def __init__(self, x, dt, A, B, C, D, seq_idx, chunk_size, entered, acc):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.n = B.shape[2:]
        self.r = self.heads // self.groups
        self.b = self.batch * self.groups
        if chunk_size is None:
            chunk_size = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
        self.acc, self.q = acc, min(chunk_size, self.length)
        self.n_chunks = -(-self.length // self.q)
        self.rest = self.length - (self.n_chunks - 1) * self.q  # tokens of the last chunk
        self.pieces = self._pieces(entered)
        self.counts = [len(chunks) for chunks in self.pieces]
        self.buffers: dict[str, tuple[Tensor, dict[tuple, Tensor]]] = {}
        self.new = partial(torch.empty, dtype=acc, device=x.device)
        D = None if D is None else self._by_head(D)  # [b 1 r p] or [b 1 r 1]
        per_head = D is not None and D.shape[3] == 1
        self.D = None if per_head else D
        self.D_head = D.transpose(1, 2)[..., 0] if per_head else None  # [b r 1]
        self.x = self.by_piece(x)
        BC = (self.by_chunk(t.to(acc).flatten(2)) for t in (B, C))  # [chunk b q n]
        self.BC = [[part.flatten(0, 1) for part in self.split(t)] for t in BC]
        self._decays(self.by_chunk(dt), self._by_head(A)[..., 0], seq_idx)

    def _pieces(self, entered: bool) -> list[range]:
        """The numbers of each piece's chunks.

        If no state enters the first chunk, it is a piece of its own, and so is the last, whose
        state perhaps nobody wants then. A shorter last one always is.
        """
        most = max(1, PIECE_ELEMENTS // (self.batch * self.q * self.heads * self.head_dim))
        whole = entered and self.rest == self.q
        first = 0 if entered else min(1, self.n_chunks - 1)
        last = self.n_chunks if whole else self.n_chunks - 1
        count = -(-(last - first) // most)
        between = (first + i * (last - first) // count for i in range(count))
        cuts = sorted({0, *between, last, self.n_chunks})
        return [range(*ends) for ends in pairwise(cuts)]

    def _by_head(self, t: Tensor) -> Tensor:
        t = t.to(self.acc).view(1, self.groups, 1, self.r, -1)
        return t.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def _decays(self, dt: Tensor, A: Tensor, seq_idx: Tensor | None) -> None:
        """entry, exit and whole of all chunks, and what each piece has of them and of cs and dt."""
        cs = sums_of_log_decays(log_decays(dt, A), 2)
        self.entry = cs.clamp(min=FLOOR).exp_()
        self.exit = (cs[:, :, -1:] - cs).clamp_(min=FLOOR).exp_().mul_(dt)
        self.whole = self.entry[:, :, -1]
        seq = [None] * len(self.pieces)
        if seq_idx is not None:
            ids = self.by_chunk(seq_idx[..., None].expand(-1, -1, self.groups), repeat=True)
            before = torch.cat([ids[:1, :, :1], ids[:-1, :, -1:]])  # of the token before a chunk
            self.entry = self.entry * (ids == before)
            self.exit = self.exit * (ids == ids[:, :, -1:])
            self.whole = self.whole * (ids[:, :, -1] == before[:, :, 0])
            seq = self.split(ids[..., 0])
        rows = (self.split(t.transpose(2, 3).contiguous(), 3) for t in (cs, dt))
        edges = (self.split(t) for t in (self.entry, self.exit))
        self.numbers = list(zip(*rows, *edges, self.whole.split(self.counts), seq, strict=True))

    def piece(self, number: int) -> _Piece:
        chunks = self.pieces[number]
        span = slice(chunks.start * self.q, min(chunks.stop * self.q, self.length))
        B, C = (parts[number] for parts in self.BC)
        return _Piece(span, self.fold(self.x[number]), B, C, *self.numbers[number])

    def cut(self, t: Tensor, k: int) -> Tensor:
        """[batch (k q) (g r) ...] -> [k batch g q r ...], a view."""
        batch, length, heads, *more = t.shape
        t = t.view(batch, k, length // k, self.groups, heads // self.groups, *more)
        return t.permute(1, 0, 3, 2, *range(4, t.ndim))

    def fold(self, t: Tensor) -> Tensor:
        """[k batch g q r ...] -> [k b q r ...], a view where there is one group."""
        return t.to(self.acc).flatten(1, 2)

    def unfold(self, t: Tensor) -> Tensor:
        """[k b q r ...] -> [k batch g q r ...], a view."""
        return t.unflatten(1, (self.batch, self.groups))

    def by_piece(self, t: Tensor) -> list[Tensor]:
        """[batch length (g r) ...] -> of each piece [k batch g q r ...], views."""
        if self.rest == self.q:
            return list(self.cut(t, self.n_chunks).split(self.counts))
        full, last = t[:, : -self.rest], t[:, -self.rest :]
        return [*self.cut(full, self.n_chunks - 1).split(self.counts[:-1]), self.cut(last, 1)]

    def by_chunk(self, t: Tensor, repeat: bool = False) -> Tensor:
        """[batch length (g r)] -> [chunk b q r], filled up with zeros or with the last token's."""
        if self.rest < self.q:
            last = t[:, -1:] if repeat else torch.zeros_like(t[:, -1:])
            t = torch.cat([t, last.expand(-1, self.q - self.rest, -1)], 1)
        return self.cut(t, self.n_chunks).flatten(1, 2)

    def by_token(self, t: Tensor) -> Tensor:
        """[chunk b q r] -> [batch length (g r)]."""
        t = self.unfold(t).permute(1, 0, 3, 2, 4)
        return t.reshape(self.batch, -1, self.heads)[:, : self.length]

    def split(self, t: Tensor, dim: int = 2) -> list[Tensor]:
        """[chunk b ... q ...], where `dim` is q's -> of each piece [k b ... q ...], views."""
        *parts, last = t.split(self.counts)
        return [*parts, last.narrow(dim, 0, self.rest)]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory that lives as long as the sweep and is used by every piece."""
        full, views = self.buffers.get(name, (None, {}))
        if shape not in views:
            size = math.prod(shape)
            if full is None or full.numel() < size:
                self.buffers[name] = full, views = self.new(size), {}
            views[shape] = full[:size].view(shape)
        return views[shape]

    def states(self, name: str, count: int) -> Tensor:
        return self.buffer(name, count, self.b, self.r * self.head_dim, self.n)

    def fold_states(self, states: Tensor | None) -> Tensor | None:
        """[batch (g r) p n] -> [b (r p) n], contiguous."""
        if states is None:
            return None
        return states.to(self.acc).reshape(self.b, -1, self.n).contiguous()

    def between(self, states: Tensor, chunks: range, entered: bool) -> tuple:
        """The states that enter a piece's chunks and those that leave them, of all that enter."""
        entering, leaving = (states[chunks.start + i : chunks.stop + i] for i in (0, 1))
        return (entering if entered else None), leaving

    def around(self, name: str, known: Tensor | None, chunks: range, at: int) -> tuple:
        """The states that enter a piece's chunks and those that leave them: all but one the same.

        One is known, None if all zeros: the first that enters (at = 0), or the last that leaves
        (at = -1); the others are to be written. For a piece of one chunk it is not copied.
        """
        if len(chunks) == 1:
            known = None if known is None else known[None]
            other = self.states(f"{name} {chunks[0] % 2}", 1)  # the known one is not there
            return (known, other) if at == 0 else (other, known)
        both = self.states(name, len(chunks) + 1)
        both[at] = 0 if known is None else known
        return both[:-1], both[1:]

    def hands_on(self, chunks: range) -> bool:
        """Whether a chunk of a piece has another after it, which reads its state."""
        return len(chunks) > 1 or chunks.stop < self.n_chunks

    def pass_on(self, piece: _Piece, entering: Tensor | None, leaving: Tensor) -> None:
        """Writes leaving; but for its first, entering is the same memory."""
        torch.bmm(self.at_exit(piece).transpose(1, 2), piece.B, out=leaving.flatten(0, 1))
        if entering is not None:
            self.add_decayed(entering[0], piece.whole[0], leaving[0])
        for c in range(1, len(leaving)):
            self.add_decayed(leaving[c - 1], piece.whole[c], leaving[c])

    def add_decayed(self, state: Tensor, whole: Tensor, to: Tensor) -> None:
        self.by_head(to).addcmul_(self.by_head(state), whole[..., None])

    def at_exit(self, piece: _Piece) -> Tensor:
        """V = exp(cs_last - cs) dt x, [(k b) q (r p)]."""
        V = torch.mul(piece.x, piece.exit[..., None], out=self.buffer("V", *piece.x.shape))
        return self.rows(V)

    def rows(self, t: Tensor) -> Tensor:
        """[k b q r p] -> [(k b) q (r p)]."""
        return t.view(-1, t.shape[2], self.r * self.head_dim)

    def by_head(self, S: Tensor) -> Tensor:
        """[... (r p) n] -> [... r (p n)]."""
        return S.view(*S.shape[:-2], self.r, self.head_dim * self.n)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=self.buffer("products", *a.shape))

    def dots(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Sums a b over the last dimension, chunk after chunk: the products of one stay cached."""
        for parts in zip(a, b, out, strict=True):
            torch.sum(self.products(*parts[:2]), -1, out=parts[2])

    def per_head(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Products [r i m] x [r m j]: left [k b r i m], right [k b r m j], any strides."""
        out = self.buffer(name, *left.shape[:4], right.shape[4])
        for factors in zip(*(_matrices(t) for t in (left, right, out)), strict=True):
            torch.bmm(*factors[:2], out=factors[2])
        return out

    def read(self, piece: _Piece, states: Tensor | None) -> Tensor | None:
        """C S for the entering states, [k b q r p]."""
        if states is None:
            return None
        return torch.bmm(piece.C, states.flatten(0, 1).transpose(1, 2)).view(piece.x.shape)

    def decays(self, piece: _Piece) -> Tensor:
        """L_ij = exp(cs_i - cs_j) dt_j, and just dt_j where j > i; [k b r i j]."""
        L = self.buffer("L", *piece.cs.shape, piece.cs.shape[3])
        torch.sub(piece.cs[..., :, None], piece.cs[..., None, :], out=L)
        return L.clamp_(FLOOR, 0).exp_().mul_(piece.dt[..., None, :])

    def seen(self, piece: _Piece, t: Tensor) -> Tensor:
        """t [k b i j], made zero where token i does not see token j."""
        t.tril_()
        if piece.seq is not None:
            t.mul_(piece.seq[..., :, None] == piece.seq[..., None, :])
        return t

    def scores(self, piece: _Piece) -> Tensor:
        """CB_ij = C_i B_j, zero where token i does not see token j; [k b 1 i j]."""
        CB = torch.bmm(piece.C, piece.B.transpose(1, 2))
        return self.seen(piece, CB.unflatten(0, piece.x.shape[:2]))[:, :, None]

    def weigh(self, L: Tensor, CB: Tensor, out: Tensor) -> Tensor:
        """W_ij = L_ij CB_ij, and D more where i = j."""
        W = torch.mul(L, CB, out=out)
        if self.D_head is not None:
            W.diagonal(dim1=3, dim2=4).add_(self.D_head)
        return W

    def outputs(
        self, W: Tensor, piece: _Piece, CS: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """y of a piece, [batch (k q) heads p]: W x + exp(cs) C S, and D x if W is without D."""
        k, _, q = piece.x.shape[:3]
        if out is None:
            out = self.buffer("y", self.batch, k * q, self.heads, self.head_dim)
        y = self.per_head("inside", W, piece.x.transpose(2, 3)).transpose(2, 3)  # [k b q r p]
        if self.D is not None:
            y.addcmul_(piece.x, self.D)
        self.write(self.cut(out, k), y, CS, piece.entry)
        return out

    def write(
        self,
        to: Tensor,
        values: Tensor,
        more: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """values + factors more, both [k b q r p], to a [k batch g q r p]; factors [k b q r]."""
        if more is None:
            to.copy_(self.unfold(values))
        else:
            terms = (self.unfold(t) for t in (values, more, factors[..., None]))
            torch.addcmul(*terms, out=to)


def _matrices(t: Tensor) -> list[Tensor]:
    """[k b r i j] -> all its [r i j]."""
    return [matrices for chunk in t.unbind() for matrices in chunk.unbind()]


def forward(
    inputs: ScanInputs,
    finish: Callable[[slice, Tensor], None],
    want_states: bool = True,
    out: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """One sweep; `finish(span, y)` gets each piece's y, [batch tokens heads p], before any gate.

    y is a part of `out` if that is given, else memory that the next piece uses again. Returns the
    final states if they are wanted, in memory of the sweep, and, to be kept for `backward`, those
    that enter the chunks and what the pieces read of them; nothing if the states take more than
    twice the memory of x.
    """
    x, dt, A, B, C, D, _, initial_states, dt_bias, seq_idx, _, chunk_size, *step_options = inputs
    acc = inputs.accumulator
    dts = step_sizes(dt, dt_bias, *step_options, acc)
    sweep = _Sweep(x, dts, A, B, C, D, seq_idx, chunk_size, initial_states is not None, acc)
    S = sweep.fold_states(initial_states)
    kept, reads = None, []
    if keep and sweep.n_chunks > 1 and sweep.n <= 2 * sweep.q:
        kept = sweep.states("S", sweep.n_chunks + 1)
        if S is not None:
            kept[0] = S
    for number, chunks in enumerate(sweep.pieces):
        piece = sweep.piece(number)
        L = sweep.decays(piece)
        W = sweep.weigh(L, sweep.scores(piece), L)
        if kept is None:
            entering, leaving = sweep.around("S", S, chunks, 0)
        else:
            entering, leaving = sweep.between(kept, chunks, S is not None)
        if want_states or sweep.hands_on(chunks):
            sweep.pass_on(piece, entering, leaving)
        CS = sweep.read(piece, entering)
        if kept is not None:
            reads.append(CS)
        finish(piece.span, sweep.outputs(W, piece, CS, None if out is None else out[:, piece.span]))
        S = leaving[-1]
    return S.view(
        len(x), -1, *x.shape[3:], sweep.n
    ) if want_states else None, [] if kept is None else [kept, *reads]


def backward(
    inputs: ScanInputs,
    gradient: Callable[[slice, Callable[[], Tensor]], Tensor],
    dstates: Tensor | None,
    into: SequenceGradients,
    kept: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The sweep forward for the entering states, unless they are `kept`, and one back.

    Writes dx, ddt, dB and dC. `gradient(span, y)` returns that of a piece's y, both [batch tokens
    heads p]; y() computes y, as `forward` handed it over. Returns the gradients of A, D,
    initial_states and dt_bias.
    """
    x, dt, A, B, C, D, _, initial_states, dt_bias, seq_idx, _, chunk_size, *step_options = inputs
    dx, ddt, dB, dC = into
    acc = inputs.accumulator
    dts = step_sizes(dt, dt_bias, *step_options, acc).clamp_(min=TINY)
    entered = [initial_states is not None]
    sweep = _Sweep(x, dts, A, B, C, D, seq_idx, chunk_size, entered[0], acc)
    entered += [True] * (len(sweep.pieces) - 1)
    states, *reads = kept or (None,)
    if states is None:
        states = sweep.states("S", sweep.n_chunks + 1)
        if initial_states is not None:
            states[0] = sweep.fold_states(initial_states)
        for number, chunks in enumerate(sweep.pieces):
            if sweep.hands_on(chunks):
                around = sweep.between(states, chunks, entered[number])
                sweep.pass_on(sweep.piece(number), *around)

    dS = sweep.fold_states(dstates)
    dD = None if D is None else dts.new_zeros(sweep.b, sweep.r, *D.shape[1:])
    dx_pieces, dB_pieces, dC_pieces = (sweep.by_piece(t) for t in (dx, dB, dC))
    # What the gradients of dt A and log dt are summed from; [chunk b r q], others [chunk b q r].
    dcs, dlog = dts.new_zeros(2, sweep.n_chunks, sweep.b, sweep.r, sweep.q)
    at_entry, at_exit, through = (
        torch.zeros_like(t) for t in (sweep.entry, sweep.exit, sweep.whole)
    )
    sums = [sweep.split(t, 3) for t in (dcs, dlog)] + [sweep.split(t) for t in (at_entry, at_exit)]
    for number, chunks in reversed(list(enumerate(sweep.pieces))):
        k, piece = len(chunks), sweep.piece(number)
        xc, Bc, Cc = piece.x, piece.B, piece.C
        dcs_c, dlog_c, at_entry_c, at_exit_c = (parts[number] for parts in sums)
        S, _ = sweep.between(states, chunks, entered[number])
        L, CB = sweep.decays(piece), sweep.scores(piece)
        W = sweep.weigh(L, CB, sweep.buffer("W", *L.shape))
        CS = reads[number] if reads else sweep.read(piece, S)
        G = gradient(piece.span, partial(sweep.outputs, W, piece, CS))
        G = sweep.fold(sweep.cut(G, k))

        # Inside the chunks: y_i = sum_j W_ij x_j.
        Gr = G.transpose(2, 3)  # [k b r q p]
        T = sweep.per_head("T", Gr, xc.permute(0, 1, 3, 4, 2))  # dL/dW_ij
        if sweep.D_head is not None:
            dD += T.diagonal(dim1=3, dim2=4).sum((0, 3)).view_as(dD)
        dxc = sweep.per_head("inside", W.transpose(3, 4), Gr).transpose(2, 3)
        if sweep.D is not None:
            dD += sweep.products(xc, G).sum((0, 2))
            dxc.addcmul_(G, sweep.D)
        dCB = sweep.seen(piece, T.mul_(L).sum(2)).flatten(0, 1)
        dCc, dBc = torch.bmm(dCB, Bc), torch.bmm(dCB.transpose(1, 2), Cc)
        M = T.mul_(CB)  # dL/d(cs_i - cs_j + log dt_j)
        diagonal = M.diagonal(dim1=3, dim2=4)
        dlog_c.copy_(diagonal)
        diagonal.zero_()
        columns = M.sum(3)
        dlog_c += columns
        torch.sub(M.sum(4), columns, out=dcs_c)

        # Across their edges: y_i += exp(cs_i) C_i S, and S' = exp(cs_last) S + sum_j V_j B_j.
        dentering, dleaving = sweep.around("dS", dS, chunks, -1)
        if S is not None:
            sweep.dots(CS, G, at_entry_c)
            Gs = torch.mul(G, piece.entry[..., None], out=sweep.buffer("Gs", *G.shape))
            Gs = sweep.rows(Gs)
            dCc.baddbmm_(Gs, S.flatten(0, 1))
            torch.bmm(Gs.transpose(1, 2), Cc, out=dentering.flatten(0, 1))
            if dleaving is not None:
                sweep.add_decayed(dleaving[-1], piece.whole[-1], dentering[-1])
            for c in reversed(range(k - 1)):
                sweep.add_decayed(dentering[c + 1], piece.whole[c], dentering[c])
            dS = dentering[0]
        left = None
        if dleaving is not None:
            dleft = dleaving.flatten(0, 1)
            left = torch.bmm(Bc, dleft.transpose(1, 2)).view(xc.shape)
            sweep.dots(left, xc, at_exit_c)
            dBc.baddbmm_(sweep.at_exit(piece), dleft)
            if S is not None:
                both = (sweep.by_head(t) for t in (dleaving, S))
                sweep.dots(*both, through[chunks.start : chunks.stop])

        sweep.write(dx_pieces[number], dxc, left, piece.exit)
        for pieces, grad in ((dB_pieces, dBc), (dC_pieces, dCc)):
            sweep.write(pieces[number], grad.view(k, sweep.b, -1, 1, sweep.n))

    at_exit *= sweep.exit
    dcs = dcs.transpose(2, 3).addcmul(at_entry, sweep.entry)
    dl = dcs.flip(2).cumsum(2).flip(2)  # sum over i >= t
    dl = dl.add_(at_exit.cumsum(2).sub_(at_exit)).add_((sweep.whole * through)[:, :, None])
    dl, dlog = (sweep.by_token(t) for t in (dl, dlog.transpose(2, 3) + at_exit))
    rates = finite_rates(A.to(acc))
    dl.masked_fill_(dts * rates < SMALLEST_LOG_DECAY, 0)  # these no longer depend on dt and A
    dA = (dl * dts).sum((0, 1)).to(A.dtype)
    draw = dlog.div_(dts).addcmul_(dl, rates)
    draw = step_sizes_backward(draw, dt, dt_bias, *step_options)
    ddt.copy_(draw)
    dbias = None if dt_bias is None else draw.sum((0, 1)).to(dt_bias.dtype)
    if D is not None:
        dD = dD.view(sweep.batch, *D.shape).sum(0).to(D.dtype)
    dinitial = None
    if initial_states is not None:
        dinitial = dS.reshape(initial_states.shape).to(initial_states.dtype)
    return dA, dD, dinitial, dbias


def gate_backward(y: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y and z from that of y silu(z), and y silu(z); all in y's dtype."""
    z, grad = z.to(y.dtype), grad.to(y.dtype)
    gate = F.silu(z)
    return grad * gate, torch.ops.aten.silu_backward(grad * y, z), y * gate
