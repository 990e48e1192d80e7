"""The SSD scan in pure torch: one sweep over chunks, forward, and one back, written by hand.

A sweep takes some chunks at a time, a piece: as many as stay in the cache. What a chunk does by
itself is done for all of a piece at once, and only the state goes from chunk to chunk. Heads of a
group share B and C: the products with the state are single matrix products over all heads of a
group. `forward` and `backward` hand over a piece's outputs while they are there, so that what
follows the scan, a gate here and the norm in the mixer, needs no sweep of its own. Symbols are
those of the paper (arXiv 2405.21060); k is the chunks of a piece, b batch times groups, q the
tokens of a chunk, r the heads of a group, p the head size, n the state size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.backend import uncompiled
from ysnake_kernels.numerics import accumulator, step_sizes, step_sizes_backward

CPU_CHUNK = 64  # 32 to 64 measured best on two cores, 128 and above lost
GPU_CHUNK = 128
PIECE_ELEMENTS = 256 * 1024  # of x in a piece of several chunks: a megabyte in float32
TINY = 1e-18  # of dt where a gradient is divided by it: as good as zero
FLOOR = -60.0  # of an exponent: e^-60 is as good as zero, and smaller numbers slow a CPU tenfold


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Arguments as `ssd_scan` has checked them."""
    options = (chunk_size, dt_softplus, dt_limit)
    return uncompiled(_Scan.apply)(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, options)


def _fold_state(states: Tensor, groups: int) -> Tensor:
    """[batch (g r) p n] -> [b n (r p)], contiguous."""
    t = states.unflatten(1, (groups, -1)).flatten(0, 1)  # [b r p n]
    return t.flatten(1, 2).transpose(1, 2).contiguous()


def _unfold_state(S: Tensor, groups: int, heads: int) -> Tensor:
    """[b n (r p)] -> [batch (g r) p n], contiguous."""
    t = S.transpose(1, 2).unflatten(0, (-1, groups))  # [batch g (r p) n]
    return t.reshape(t.shape[0], heads, -1, S.shape[1]).contiguous()


@dataclass
class _Piece:
    """Some chunks in a row. No decay's exponent is above 0; zero stands for another document."""

    span: slice  # of the tokens
    x: Tensor  # [k b q r p]
    dt: Tensor  # [k b q r]
    B: Tensor  # [(k b) q n]
    C: Tensor  # [(k b) q n]
    L: Tensor | None  # [k b r i j] exp(cs_i - cs_j) dt_j for j <= i, else 0
    entry: Tensor  # [k b q r] exp(cs_i): from the entering state to token i
    exit: Tensor  # [k b q r] exp(cs_last - cs_j) dt_j: from token j to the leaving state
    whole: Tensor  # [k b 1 r] exp(cs_last): from the entering to the leaving state


class _Sweep:
    """The inputs folded by group and cut into pieces, with the buffers that the pieces share.

    The states that enter a piece's chunks, or leave them, are [k b n (r p)], None if all zeros.
    """

    def __init__(self, x, dt, A, B, C, D, seq_idx, chunk_size, acc):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.n = B.shape[2:]
        self.r = self.heads // self.groups
        self.b = self.batch * self.groups
        if chunk_size is None:
            chunk_size = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
        self.acc, self.q = acc, min(chunk_size, self.length)
        self.n_chunks = -(-self.length // self.q)
        self.x, self.dt, self.B, self.C = x, dt, B, C
        self.A = self._by_head(A)[..., 0]  # [b 1 r]
        D = None if D is None else self._by_head(D)  # [b 1 r p] or [b 1 r 1]
        per_head = D is not None and D.shape[3] == 1
        self.D = None if per_head else D
        self.D_head = D.transpose(1, 2)[..., 0] if per_head else None  # [b r 1]
        self.seq_idx = seq_idx
        self.buffers: dict[str, Tensor] = {}

    def _by_head(self, t: Tensor) -> Tensor:
        t = t.to(self.acc).view(1, self.groups, 1, self.r, -1)
        return t.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def pieces(self) -> list[range]:
        """The numbers of each piece's chunks.

        The first chunk, which perhaps no state enters, and the last, which perhaps is shorter and
        whose state perhaps nobody wants, are pieces of their own.
        """
        size = max(1, PIECE_ELEMENTS // (self.batch * self.q * self.heads * self.head_dim))
        last = self.n_chunks - 1
        cuts = sorted({0, *range(1, last, size), last, self.n_chunks})
        return [range(*ends) for ends in pairwise(cuts)]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory that lives as long as the sweep and is used by every piece."""
        full = self.buffers.get(name)
        size = torch.Size(shape).numel()
        if full is None or full.numel() < size:
            full = self.buffers[name] = torch.empty(size, dtype=self.acc, device=self.x.device)
        return full[:size].view(shape)

    def states(self, name: str, count: int) -> Tensor:
        return self.buffer(name, count, self.b, self.n, self.r * self.head_dim)

    def cut(self, t: Tensor, k: int) -> Tensor:
        """[batch (k q) (g r) ...] -> [k batch g q r ...], a view."""
        t = t.unflatten(2, (self.groups, -1)).unflatten(1, (k, -1))
        return t.movedim((1, 0, 3, 2), (0, 1, 2, 3))

    def fold(self, t: Tensor, k: int) -> Tensor:
        """[batch (k q) (g r) ...] -> [k b q r ...], a view where there is one group."""
        return self.cut(t.to(self.acc), k).flatten(1, 2)

    def unfold(self, t: Tensor) -> Tensor:
        """[k b q r ...] -> [batch (k q) (g r) ...]."""
        t = t.unflatten(1, (-1, self.groups)).movedim((1, 0, 3, 2), (0, 1, 2, 3))
        return t.flatten(1, 2).flatten(2, 3)

    def write(self, values: Tensor, to: Tensor) -> None:
        """Values [k b q r ...] into a tensor [batch (k q) (g r) ...]."""
        self.cut(to, len(values)).copy_(values.unflatten(1, (-1, self.groups)))

    def piece(self, chunks: range, with_L: bool = True) -> _Piece:
        k = len(chunks)
        span = slice(chunks[0] * self.q, min(chunks.stop * self.q, self.length))
        x, dt, B, C = (self.fold(t[:, span], k) for t in (self.x, self.dt, self.B, self.C))
        B, C = (t[:, :, :, 0].flatten(0, 1) for t in (B, C))
        return _Piece(span, x, dt, B, C, *self.decays(dt, chunks, span, with_L))

    def decays(self, dt: Tensor, chunks: range, span: slice, with_L: bool) -> tuple:
        """L, entry, exit and whole of a piece."""
        cs = (dt * self.A).cumsum(2)
        entry = cs.clamp(min=FLOOR).exp_()
        exit = (cs[:, :, -1:] - cs).clamp_(min=FLOOR).exp_().mul_(dt)
        whole = entry[:, :, -1:]
        L = None
        if with_L:
            rows, sizes = (t.transpose(2, 3).contiguous() for t in (cs, dt))  # [k b r q]
            L = self.buffer("L", *rows.shape, rows.shape[3])
            torch.sub(rows[..., :, None], rows[..., None, :], out=L)
            L.clamp_(FLOOR, 0).exp_().mul_(sizes[..., None, :]).tril_()
        if self.seq_idx is not None:
            seq = self.seq_idx[:, span].unflatten(1, (len(chunks), -1))
            before = self.seq_idx[:, [max(c * self.q - 1, 0) for c in chunks]]
            seq, before = (
                t.transpose(0, 1).repeat_interleave(self.groups, 1) for t in (seq, before)
            )  # [k b q], [k b]
            entry = entry * (seq == before[..., None])[..., None]
            exit = exit * (seq == seq[..., -1:])[..., None]
            whole = whole * (seq[..., -1] == before)[..., None, None]
            if L is not None:
                L.mul_((seq[..., :, None] == seq[..., None, :])[:, :, None])
        return L, entry, exit, whole

    def around(self, name: str, known: Tensor | None, chunks: range, at: int) -> tuple:
        """The states that enter a piece's chunks and those that leave them: all but one the same.

        One is known: the first that enters (at = 0), or the last that leaves (at = -1); the others
        are to be written. For a piece of one chunk it may be None, and is not copied.
        """
        if len(chunks) == 1:
            known = None if known is None else known[None]
            other = self.states(f"{name} {chunks[0] % 2}", 1)  # the known one is not there
            return (known, other) if at == 0 else (other, known)
        both = self.states(name, len(chunks) + 1)
        both[at] = known
        return both[:-1], both[1:]

    def pass_on(self, piece: _Piece, entering: Tensor | None, leaving: Tensor) -> None:
        """Writes leaving; but for its first, entering is the same memory."""
        V = self.at_exit(piece)
        torch.bmm(piece.B.transpose(1, 2), V, out=leaving.flatten(0, 1))
        if entering is not None:
            self.add_decayed(entering[0], piece.whole[0], leaving[0])
        for c in range(1, len(leaving)):
            self.add_decayed(leaving[c - 1], piece.whole[c], leaving[c])

    def add_decayed(self, state: Tensor, whole: Tensor, to: Tensor) -> None:
        self.by_head(to).addcmul_(self.by_head(state), whole[..., None])

    def at_exit(self, piece: _Piece) -> Tensor:
        """V = exp(cs_last - cs) dt x, [(k b) q (r p)]."""
        V = torch.mul(piece.x, piece.exit[..., None], out=self.buffer("V", *piece.x.shape))
        return V.flatten(3).flatten(0, 1)

    def by_head(self, S: Tensor) -> Tensor:
        """[... n (r p)] -> [... n r p]."""
        return S.unflatten(-1, (self.r, self.head_dim))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products along the last dimension."""
        return torch.mul(a, b, out=self.buffer("dot", *a.shape)).sum(-1)

    def per_head(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Products [r i m] x [r m j]: left [k b r i m], right [k b r m j], any strides."""
        out = self.buffer(name, *left.shape[:4], right.shape[4])
        for c in range(len(left)):
            for i in range(self.b):
                torch.bmm(left[c, i], right[c, i], out=out[c, i])
        return out

    def read(self, piece: _Piece, states: Tensor | None) -> Tensor | None:
        """C S for the entering states, [k b q r p]."""
        if states is None:
            return None
        return torch.bmm(piece.C, states.flatten(0, 1)).view(piece.x.shape)

    def weigh(self, L: Tensor, CB: Tensor, out: Tensor) -> Tensor:
        """W_ij = L_ij CB_ij, and D more where i = j."""
        W = torch.mul(L, CB[:, :, None], out=out)
        if self.D_head is not None:
            W.diagonal(dim1=3, dim2=4).add_(self.D_head)
        return W

    def outputs(self, W: Tensor, piece: _Piece, CS: Tensor | None) -> Tensor:
        """y of a piece, [batch (k q) heads p]: W x + exp(cs) C S, and D x if W is without D."""
        y = self.per_head("inside", W, piece.x.transpose(2, 3)).transpose(2, 3)  # [k b q r p]
        k, b, *rest = y.shape
        out = self.buffer("y", b, k, *rest).transpose(0, 1)
        if CS is not None:
            y = torch.addcmul(y, CS, piece.entry[..., None], out=out)
        if self.D is not None:
            y = torch.addcmul(y, piece.x, self.D, out=out)
        return self.unfold(y)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    options: tuple[int | None, bool, tuple[float, float]],
    finish: Callable[[slice, Tensor], None],
    want_states: bool = True,
) -> Tensor | None:
    """One sweep; `finish(span, y)` gets each piece's y, [batch tokens heads p], before any gate.

    y is memory that the next piece uses again. Returns the final states if they are wanted.
    """
    chunk_size, *step_options = options
    acc = accumulator(x, dt, A, B, C, D, initial_states, dt_bias)
    dts = step_sizes(dt, dt_bias, *step_options, acc)
    sweep = _Sweep(x, dts, A, B, C, D, seq_idx, chunk_size, acc)
    S = None if initial_states is None else _fold_state(initial_states.to(acc), sweep.groups)
    pieces = sweep.pieces()
    for chunks in pieces:
        piece = sweep.piece(chunks)
        CB = torch.bmm(piece.C, piece.B.transpose(1, 2)).view_as(piece.L[:, :, 0])
        W = sweep.weigh(piece.L, CB, piece.L)
        entering, leaving = sweep.around("S", S, chunks, 0)
        if want_states or chunks is not pieces[-1]:
            sweep.pass_on(piece, entering, leaving)
        finish(piece.span, sweep.outputs(W, piece, sweep.read(piece, entering)))
        S = leaving[-1]
    return _unfold_state(S, sweep.groups, sweep.heads) if want_states else None


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    options: tuple[int | None, bool, tuple[float, float]],
    gradient: Callable[[slice, Callable[[], Tensor]], Tensor],
    dstates: Tensor | None,
    dx: Tensor,
    ddt: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> tuple[Tensor | None, ...]:
    """The sweep forward for the entering states, and one back; writes dx, ddt, dB and dC.

    `gradient(span, y)` returns that of a piece's y, both [batch tokens heads p]; y() computes y, as
    `forward` handed it over. Returns the gradients of A, D, initial_states and dt_bias.
    """
    chunk_size, *step_options = options
    acc = accumulator(x, dt, A, B, C, D, initial_states, dt_bias)
    dts = step_sizes(dt, dt_bias, *step_options, acc).clamp_(min=TINY)
    sweep = _Sweep(x, dts, A, B, C, D, seq_idx, chunk_size, acc)
    pieces = sweep.pieces()

    def entered(chunks: range) -> bool:
        return chunks[0] > 0 or initial_states is not None

    states = sweep.states("S", sweep.n_chunks)
    if initial_states is not None:
        states[0] = _fold_state(initial_states.to(acc), sweep.groups)
    for chunks in pieces[:-1]:
        entering = states[chunks[0] : chunks.stop] if entered(chunks) else None
        leaving = states[chunks[0] + 1 : chunks.stop + 1]
        sweep.pass_on(sweep.piece(chunks, with_L=False), entering, leaving)

    dS = None if dstates is None else _fold_state(dstates.to(acc), sweep.groups)
    dts_grad = torch.empty_like(dts)
    dl = torch.empty_like(dts)  # gradient of dt * A
    dD = None if D is None else torch.zeros(sweep.b, sweep.r, *D.shape[1:]).to(dts)
    for chunks in reversed(pieces):
        k, piece = len(chunks), sweep.piece(chunks)
        xc, Bc, Cc = piece.x, piece.B, piece.C
        S = states[chunks[0] : chunks.stop] if entered(chunks) else None
        CB = torch.bmm(Cc, Bc.transpose(1, 2)).view_as(piece.L[:, :, 0])
        W = sweep.weigh(piece.L, CB, sweep.buffer("W", *piece.L.shape))
        CS = sweep.read(piece, S)
        G = sweep.fold(gradient(piece.span, partial(sweep.outputs, W, piece, CS)), k)

        # Inside the chunks: y_i = sum_j W_ij x_j.
        Gr = G.transpose(2, 3)  # [k b r q p]
        T = sweep.per_head("T", Gr, xc.permute(0, 1, 3, 4, 2))  # dL/dW_ij
        if sweep.D_head is not None:
            dD += T.diagonal(dim1=3, dim2=4).sum((0, 3))
        dxc = sweep.per_head("inside", W.transpose(3, 4), Gr).transpose(2, 3)
        dCB = T.mul_(piece.L).sum(2).flatten(0, 1)
        M = T.mul_(CB[:, :, None])  # dL/d(cs_i - cs_j + log dt_j)
        diagonal = M.diagonal(dim1=3, dim2=4)
        dlog = diagonal.clone()  # of dt, [k b r q]
        diagonal.zero_()
        columns = M.sum(3)
        dlog, dcs = (t.transpose(2, 3) for t in (dlog.add_(columns), M.sum(4) - columns))
        dCc, dBc = torch.bmm(dCB, Bc), torch.bmm(dCB.transpose(1, 2), Cc)

        # Across their edges: y_i += exp(cs_i) C_i S, and S' = exp(cs_last) S + sum_j V_j B_j.
        dentering, dleaving = sweep.around("dS", dS, chunks, -1)
        if S is not None:
            dcs += piece.entry * sweep.dot(CS, G)
            Gs = torch.mul(G, piece.entry[..., None], out=sweep.buffer("Gs", *G.shape))
            Gs = Gs.flatten(3).flatten(0, 1)
            dCc.baddbmm_(Gs, S.flatten(0, 1).transpose(1, 2))
            torch.bmm(Cc.transpose(1, 2), Gs, out=dentering.flatten(0, 1))
            if dleaving is not None:
                sweep.add_decayed(dleaving[-1], piece.whole[-1], dentering[-1])
            for c in reversed(range(k - 1)):
                sweep.add_decayed(dentering[c + 1], piece.whole[c], dentering[c])
        dlc = dcs.flip(2).cumsum(2).flip(2)  # sum over i >= t
        if dleaving is not None:
            dleft = dleaving.flatten(0, 1)
            left = torch.bmm(Bc, dleft).view(xc.shape)
            t = sweep.dot(left, xc).mul_(piece.exit)
            dlog += t
            dlc += t.cumsum(2) - t
            dxc.addcmul_(left, piece.exit[..., None])
            dBc.baddbmm_(sweep.at_exit(piece), dleft.transpose(1, 2))
            if S is not None:
                through = sweep.dot(sweep.by_head(dleaving), sweep.by_head(S)).sum(2)  # [k b r]
                dlc += piece.whole * through[:, :, None]
        if S is not None:
            dS = dentering[0]

        sweep.write(dlc, dl[:, piece.span])
        sweep.write(dlog.div_(piece.dt), dts_grad[:, piece.span])
        if sweep.D is not None:
            dD += torch.mul(xc, G, out=sweep.buffer("V", *xc.shape)).sum((0, 2))
            dxc.addcmul_(G, sweep.D)
        sweep.write(dxc, dx[:, piece.span])
        for grad, to in ((dBc, dB), (dCc, dC)):
            sweep.write(grad.view(k, sweep.b, -1, 1, sweep.n), to[:, piece.span])

    dA = (dl * dts).sum((0, 1)).to(A.dtype)
    dts_grad.addcmul_(dl, A.to(acc))
    draw = step_sizes_backward(dts_grad, dt, dt_bias, *step_options)
    ddt.copy_(draw)
    dbias = None if dt_bias is None else draw.sum((0, 1)).to(dt_bias.dtype)
    if D is not None:
        dD = dD.view(sweep.batch, *D.shape).sum(0).to(D.dtype)
    dinitial = None
    if initial_states is not None:
        dinitial = _unfold_state(dS, sweep.groups, sweep.heads).to(initial_states.dtype)
    return dA, dD, dinitial, dbias


def gate_backward(y: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y and z from that of y silu(z), and y silu(z); all in y's dtype."""
    z, grad = z.to(y.dtype), grad.to(y.dtype)
    gate = F.silu(z)
    return grad * gate, torch.ops.aten.silu_backward(grad * y, z), y * gate


class _Scan(torch.autograd.Function):
    """Saves its inputs; recomputes everything else in backward."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, options):
        ctx.save_for_backward(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx)
        ctx.options = options
        ctx.set_materialize_grads(False)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)

        def finish(span: slice, y: Tensor) -> None:
            out[:, span] = y if z is None else y * F.silu(z[:, span].to(y.dtype))

        arguments = (x, dt, A, B, C, D, initial_states, dt_bias, seq_idx, options)
        return out, forward(*arguments, finish)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstates):
        x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(x)
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        dz = None if z is None else torch.empty_like(z)

        def gradient(span: slice, y: Callable[[], Tensor]) -> Tensor:
            if z is None:
                return dout[:, span]
            G, dz[:, span], _ = gate_backward(y(), z[:, span], dout[:, span])
            return G

        arguments = (x, dt, A, B, C, D, initial_states, dt_bias, seq_idx, ctx.options)
        grads = backward(*arguments, gradient, dstates, dx, ddt, dB, dC)
        dA, dD, dinitial, dbias = grads
        return dx, ddt, dA, dB, dC, dD, dz, dinitial, dbias, None, None
