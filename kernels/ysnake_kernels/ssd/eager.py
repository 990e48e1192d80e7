"""The SSD scan in pure torch: one sweep over chunks, forward, and one back, written by hand.

A sweep carries the state from chunk to chunk as the fused kernel does, so that its temporaries
are a chunk's and stay in the cache. Heads of a group share B and C: the products with the state
are single matrix products over all heads of a group. `forward` and `backward` hand over a chunk's
outputs while they are there, so that what follows the scan, a gate here and the norm in the mixer,
needs no sweep of its own. Symbols are those of the paper (arXiv 2405.21060); b is batch times
groups, q the tokens of a chunk, r the heads of a group, p the head size, n the state size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.backend import uncompiled
from ysnake_kernels.numerics import accumulator, step_sizes, step_sizes_backward

CPU_CHUNK = 64  # 32 to 64 measured best on two cores, 128 and above lost
GPU_CHUNK = 128
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


def _fold(t: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[batch q (g k) ...] -> [b q k ...] in `dtype`, a view where one group and the dtype allow."""
    batch, q = t.shape[:2]
    t = t.to(dtype).view(batch, q, groups, -1, *t.shape[3:])
    return t[:, :, 0] if groups == 1 else t.transpose(1, 2).flatten(0, 1)


def _unfold(t: Tensor, groups: int) -> Tensor:
    """[b q k ...] -> [batch q (g k) ...], the inverse of `_fold`."""
    return t if groups == 1 else t.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3)


def _fold_state(states: Tensor, groups: int) -> Tensor:
    """[batch (g r) p n] -> [b n (r p)], contiguous."""
    t = states.unflatten(1, (groups, -1)).flatten(0, 1)  # [b r p n]
    return t.flatten(1, 2).transpose(1, 2).contiguous()


def _unfold_state(S: Tensor, groups: int, heads: int) -> Tensor:
    """[b n (r p)] -> [batch (g r) p n], contiguous."""
    t = S.transpose(1, 2).unflatten(0, (-1, groups))  # [batch g (r p) n]
    return t.reshape(t.shape[0], heads, -1, S.shape[1]).contiguous()


@dataclass
class _Decays:
    """The decays inside one chunk; all exponents are <= 0, and zero stands for another document."""

    L: Tensor | None  # [b r i j] exp(cs_i - cs_j) for j <= i, else 0
    entry: Tensor  # [b q r] exp(cs_i): from the entering state to token i
    exit: Tensor  # [b q r] exp(cs_last - cs_j): from token j to the leaving state
    whole: Tensor  # [b 1 r] exp(cs_last): from the entering to the leaving state


class _Sweep:
    """The inputs folded by group, cut into chunks, with the buffers that the chunks share.

    A state is [b n (r p)], or None for one of zeros, which costs nothing.
    """

    def __init__(self, x, dt, A, B, C, D, seq_idx, chunk_size, acc):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.n = B.shape[2:]
        self.r = self.heads // self.groups
        self.b = self.batch * self.groups
        if chunk_size is None:
            chunk_size = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
        self.acc, self.chunk_size = acc, min(chunk_size, self.length)
        self.x, self.dt, self.B, self.C = x, dt, B, C
        self.A = self._by_head(A)[..., 0]  # [b 1 r]
        self.D = None if D is None else self._by_head(D)  # [b 1 r p] or [b 1 r 1]
        self.seq_idx = seq_idx
        self.buffers: dict[str, Tensor] = {}

    def _by_head(self, t: Tensor) -> Tensor:
        t = t.to(self.acc).view(1, self.groups, 1, self.r, -1)
        return t.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def spans(self) -> list[slice]:
        starts = range(0, self.length, self.chunk_size)
        return [slice(s, min(s + self.chunk_size, self.length)) for s in starts]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory that lives as long as the sweep: made once, used by every chunk."""
        full = self.buffers.get(name)
        size = torch.Size(shape).numel()
        if full is None or full.numel() < size:
            full = self.buffers[name] = torch.empty(size, dtype=self.acc, device=self.x.device)
        return full[:size].view(shape)

    def fold(self, t: Tensor, span: slice) -> Tensor:
        return _fold(t[:, span], self.groups, self.acc)

    def unfold(self, t: Tensor) -> Tensor:
        """[b q k ...] -> [batch q g k ...], a view."""
        return t.unflatten(0, (-1, self.groups)).transpose(1, 2)

    def chunk(self, span: slice, with_L: bool = True) -> tuple[Tensor, ...]:
        """x, dt and u = dt x of a chunk, [b q r (p)], B and C, [b q n], and its decays."""
        x, dt = self.fold(self.x, span), self.fold(self.dt, span)
        B, C = (self.fold(t, span)[:, :, 0] for t in (self.B, self.C))
        u = torch.mul(x, dt[..., None], out=self.buffer("u", *x.shape))
        return x, dt, u, B, C, self.decays(dt, span, with_L)

    def decays(self, dt: Tensor, span: slice, with_L: bool) -> _Decays:
        cs = (dt * self.A).cumsum(1)
        entry, exit = cs.clamp(min=FLOOR).exp_(), (cs[:, -1:] - cs).clamp_(min=FLOOR).exp_()
        whole = entry[:, -1:]
        L = None
        if with_L:
            q = dt.shape[1]
            rows = cs.transpose(1, 2).contiguous()  # [b r q]
            L = self.buffer("L", self.b, self.r, q, q)
            torch.sub(rows[..., :, None], rows[..., None, :], out=L)
            L.clamp_(FLOOR, 0).exp_().tril_()
        if self.seq_idx is not None:
            seq = self.seq_idx[:, span].repeat_interleave(self.groups, 0)  # [b q]
            before = self.seq_idx[:, max(span.start - 1, 0)].repeat_interleave(self.groups, 0)
            entry = entry * (seq == before[:, None])[..., None]
            exit = exit * (seq == seq[:, -1:])[..., None]
            whole = whole * (seq[:, -1] == before)[:, None, None]
            if L is not None:
                L.mul_((seq[:, :, None] == seq[:, None, :])[:, None])
        return _Decays(L, entry, exit, whole)

    def leaving(self, S: Tensor | None, u: Tensor, B: Tensor, decays: _Decays, out: Tensor) -> None:
        """Writes the state after a chunk that S enters; out may be S."""
        V = torch.mul(u, decays.exit[..., None], out=self.buffer("V", *u.shape)).flatten(2)
        if S is None:
            torch.bmm(B.transpose(1, 2), V, out=out)
        else:
            torch.mul(self.by_head(S), decays.whole[..., None], out=self.by_head(out))
            out.baddbmm_(B.transpose(1, 2), V)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products along the last dimension."""
        return torch.mul(a, b, out=self.buffer("dot", *a.shape)).sum(-1)

    def by_head(self, S: Tensor) -> Tensor:
        """[b n (r p)] -> [b n r p]."""
        return S.view(self.b, self.n, self.r, self.head_dim)

    def per_head(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Products [r i k] x [r k j] for each b: left [b r i k], right [b r k j], any strides."""
        out = self.buffer(name, self.b, self.r, left.shape[2], right.shape[3])
        for i in range(self.b):
            torch.bmm(left[i], right[i], out=out[i])
        return out

    def outputs(
        self, W: Tensor, x: Tensor, u: Tensor, CS: Tensor | None, decays: _Decays
    ) -> Tensor:
        """y of a chunk, [batch q heads p]: W u + exp(cs) C S + D x."""
        y = self.per_head("inside", W, u.transpose(1, 2)).transpose(1, 2)  # [b q r p]
        if CS is not None:
            entered = torch.mul(CS, decays.entry[..., None], out=self.buffer("V", *x.shape))
            y = entered.add_(y)
        if self.D is not None:
            y = torch.addcmul(y, x, self.D, out=self.buffer("V", *x.shape))
        return _unfold(y, self.groups)


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
    """One sweep; `finish(span, y)` gets each chunk's y, [batch q heads p], before any gate.

    y is memory that the next chunk uses again. Returns the final states if they are wanted.
    """
    chunk_size, *step_options = options
    acc = accumulator(x, dt, A, B, C, D, initial_states, dt_bias)
    dts = step_sizes(dt, dt_bias, *step_options, acc)
    sweep = _Sweep(x, dts, A, B, C, D, seq_idx, chunk_size, acc)
    S = None if initial_states is None else _fold_state(initial_states.to(acc), sweep.groups)
    memory = sweep.buffer("S", sweep.b, sweep.n, sweep.r * sweep.head_dim)
    spans = sweep.spans()
    for span in spans:
        xc, _, u, Bc, Cc, decays = sweep.chunk(span)
        W = decays.L.mul_(torch.bmm(Cc, Bc.transpose(1, 2))[:, None])
        CS = None if S is None else torch.bmm(Cc, S).view(xc.shape)
        finish(span, sweep.outputs(W, xc, u, CS, decays))
        if want_states or span is not spans[-1]:
            sweep.leaving(S, u, Bc, decays, memory)
            S = memory
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

    `gradient(span, y)` returns that of a chunk's y, both [batch q heads p]; y() computes y, as
    `forward` handed it over. Returns the gradients of A, D, initial_states and dt_bias.
    """
    chunk_size, *step_options = options
    acc = accumulator(x, dt, A, B, C, D, initial_states, dt_bias)
    dts = step_sizes(dt, dt_bias, *step_options, acc)
    sweep = _Sweep(x, dts, A, B, C, D, seq_idx, chunk_size, acc)
    spans = sweep.spans()

    S = None if initial_states is None else _fold_state(initial_states.to(acc), sweep.groups)
    memory = sweep.buffer("S", len(spans), sweep.b, sweep.n, sweep.r * sweep.head_dim)
    entering = [S, *memory[1:]]
    for c, span in enumerate(spans[:-1]):
        _, _, u, Bc, _, decays = sweep.chunk(span, with_L=False)
        sweep.leaving(entering[c], u, Bc, decays, entering[c + 1])

    dS = None if dstates is None else _fold_state(dstates.to(acc), sweep.groups).clone()
    dts_grad = torch.empty_like(dts)
    dl = torch.empty_like(dts)  # gradient of dt * A
    dD = None if D is None else torch.zeros(sweep.b, sweep.r, sweep.head_dim).to(dts)
    for span in reversed(spans):
        S = entering.pop()
        xc, dtc, u, Bc, Cc, decays = sweep.chunk(span)
        CB = torch.bmm(Cc, Bc.transpose(1, 2))
        W = torch.mul(decays.L, CB[:, None], out=sweep.buffer("W", *decays.L.shape))
        CS = None if S is None else torch.bmm(Cc, S).view(xc.shape)
        y = partial(sweep.outputs, W, xc, u, CS, decays)
        G = _fold(gradient(span, y), sweep.groups, acc)

        # Inside the chunk: y_i = sum_j W_ij u_j, with u = dt x.
        Gr = G.transpose(1, 2)  # [b r q p]
        T = sweep.per_head("T", Gr, u.permute(0, 2, 3, 1)).mul_(decays.L)  # dL/dCB_ij by head
        du = sweep.per_head("inside", W.transpose(2, 3), Gr).transpose(1, 2)
        dCB = T.sum(1)
        M = T.mul_(CB.tril_(-1)[:, None])  # dL/d(cs_i - cs_j), j < i strictly
        dcs = (M.sum(3) - M.sum(2)).transpose(1, 2)  # [b q r]
        dCc, dBc = torch.bmm(dCB, Bc), torch.bmm(dCB.transpose(1, 2), Cc)

        # Across its edges: y_i += exp(cs_i) C_i S, and S' = exp(cs_last) S + sum_j V_j B_j.
        if S is not None:
            dcs += decays.entry * sweep.dot(CS, G)
            Gs = torch.mul(G, decays.entry[..., None], out=sweep.buffer("Gs", *G.shape)).flatten(2)
            dCc.baddbmm_(Gs, S.transpose(1, 2))
        dlc = dcs.flip(1).cumsum(1).flip(1)  # sum over i >= t
        if dS is not None:
            left = torch.bmm(Bc, dS).view(xc.shape).mul_(decays.exit[..., None])
            q = sweep.dot(left, u)
            dlc += q.cumsum(1) - q
            du = left.add_(du)
            V = torch.mul(u, decays.exit[..., None], out=sweep.buffer("V", *u.shape)).flatten(2)
            dBc.baddbmm_(V, dS.transpose(1, 2))
        if S is not None and dS is not None:
            through = sweep.dot(sweep.by_head(dS), sweep.by_head(S)).sum(1)  # [b r]
            dlc += decays.whole * through[:, None]
        if S is not None:
            if dS is None:
                dS = torch.bmm(Cc.transpose(1, 2), Gs)
            else:
                sweep.by_head(dS).mul_(decays.whole[..., None])
                dS.baddbmm_(Cc.transpose(1, 2), Gs)

        dl[:, span] = _unfold(dlc, sweep.groups)
        dts_grad[:, span] = _unfold(sweep.dot(xc, du), sweep.groups)
        if D is not None:
            dD += torch.mul(xc, G, out=sweep.buffer("V", *xc.shape)).sum(1)
        place = dx[:, span].unflatten(2, (sweep.groups, -1))
        du = torch.mul(du, dtc[..., None], out=u)
        if D is not None:
            du.addcmul_(G, sweep.D)
        place.copy_(sweep.unfold(du))
        dB[:, span] = _unfold(dBc[:, :, None], sweep.groups)
        dC[:, span] = _unfold(dCc[:, :, None], sweep.groups)

    dA = (dl * dts).sum((0, 1)).to(A.dtype)
    dts_grad.addcmul_(dl, A.to(acc))
    draw = step_sizes_backward(dts_grad, dt, dt_bias, *step_options)
    ddt.copy_(draw)
    dbias = None if dt_bias is None else draw.sum((0, 1)).to(dt_bias.dtype)
    if D is not None:
        dD = dD.view(sweep.batch, sweep.heads, -1).sum(0)
        dD = (dD if D.ndim == 2 else dD.sum(1)).to(D.dtype)
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
