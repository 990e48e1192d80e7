"""The SSD scan in pure torch: one sweep over chunks, forward, and one back, written by hand.

A sweep carries the state from chunk to chunk as the fused kernel does, so that its temporaries
are a chunk's and stay in the cache. Heads of a group share B and C: the products with the state
are single matrix products over all heads of a group. Symbols are those of the paper (arXiv
2405.21060); b is batch times groups, q the tokens of a chunk, r the heads of a group, p the head
size, n the state size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.numerics import accumulator, step_sizes

CPU_CHUNK = 64  # 32 to 64 measured best on two cores, 128 and above lost
GPU_CHUNK = 128


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
    if chunk_size is None:
        chunk_size = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
    chunk_size = min(chunk_size, x.shape[1])
    options = (chunk_size, dt_softplus, dt_limit)
    return _Scan.apply(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, options)


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

    L: Tensor  # [b r i j] exp(cs_i - cs_j) for j <= i, else 0
    entry: Tensor  # [b q r] exp(cs_i): from the entering state to token i
    exit: Tensor  # [b q r] exp(cs_last - cs_j): from token j to the leaving state
    whole: Tensor  # [b 1 r] exp(cs_last): from the entering to the leaving state


class _Sweep:
    """The inputs folded by group, cut into chunks, with the buffers that the chunks share."""

    def __init__(self, x, dt, A, B, C, seq_idx, chunk_size, acc):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.n = B.shape[2:]
        self.r = self.heads // self.groups
        self.b = self.batch * self.groups
        self.acc, self.chunk_size = acc, chunk_size
        self.x, self.dt, self.B, self.C = x, dt, B, C
        A = A.to(acc).view(1, self.groups, 1, self.r)
        self.A = A.expand(self.batch, -1, -1, -1).flatten(0, 1)  # [b 1 r]
        self.seq_idx = seq_idx
        self.upper = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
        self.buffers: dict[str, Tensor] = {}

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

    def fold_bc(self, span: slice) -> tuple[Tensor, Tensor]:
        """B and C of a chunk, [b q n] each."""
        return tuple(self.fold(t, span)[:, :, 0] for t in (self.B, self.C))

    def decays(self, dt: Tensor, span: slice, with_L: bool = True) -> _Decays:
        """dt is the chunk's, [b q r]."""
        cs = (dt * self.A).cumsum(1)
        entry, whole, exit = cs.exp(), cs[:, -1:].exp(), (cs[:, -1:] - cs).exp_()
        if with_L:
            q = dt.shape[1]
            rows = cs.transpose(1, 2).contiguous()  # [b r q]
            L = self.buffer("L", self.b, self.r, q, q)
            torch.sub(rows[..., :, None], rows[..., None, :], out=L)
            L.masked_fill_(self.upper[:q, :q], -torch.inf).exp_()
        else:
            L = None
        if self.seq_idx is not None:
            seq = self.seq_idx[:, span].repeat_interleave(self.groups, 0)  # [b q]
            before = self.seq_idx[:, max(span.start - 1, 0)].repeat_interleave(self.groups, 0)
            entry = entry * (seq == before[:, None])[..., None]
            exit = exit * (seq == seq[:, -1:])[..., None]
            whole = whole * (seq[:, -1] == before)[:, None, None]
            if L is not None:
                L.mul_((seq[:, :, None] == seq[:, None, :])[:, None])
        return _Decays(L, entry, exit, whole)

    def advance(self, S: Tensor, x: Tensor, dt: Tensor, B: Tensor, decays: _Decays) -> None:
        """S [b n (r p)], the entering state, becomes the leaving state in place."""
        V = torch.mul(x, (dt * decays.exit)[..., None], out=self.buffer("V", *x.shape))
        S.view(self.b, self.n, self.r, -1).mul_(decays.whole[..., None])
        S.baddbmm_(B.transpose(1, 2), V.flatten(2))

    def per_head(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Products [r i k] x [r k j] for each b: left [b r i k], right [b r k j], any strides."""
        out = self.buffer(name, self.b, self.r, left.shape[2], right.shape[3])
        for i in range(self.b):
            torch.bmm(left[i], right[i], out=out[i])
        return out


class _Scan(torch.autograd.Function):
    """Saves its inputs; recomputes everything else in backward."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, options):
        chunk_size, dt_softplus, dt_limit = options
        acc = accumulator(x, dt, A, B, C, D, z, initial_states, dt_bias)
        ctx.save_for_backward(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx)
        ctx.options, ctx.acc = options, acc
        ctx.set_materialize_grads(False)

        dts = step_sizes(dt, dt_bias, dt_softplus, dt_limit, acc)
        sweep = _Sweep(x, dts, A, B, C, seq_idx, chunk_size, acc)
        S = _entering(sweep, initial_states)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for span in sweep.spans():
            xc, dtc = sweep.fold(x, span), sweep.fold(dts, span)
            Bc, Cc = sweep.fold_bc(span)
            decays = sweep.decays(dtc, span)
            W = decays.L.mul_(torch.bmm(Cc, Bc.transpose(1, 2))[:, None])
            yc = _outputs(sweep, W, xc, dtc, torch.bmm(Cc, S).view(xc.shape), decays)
            if D is not None:
                yc.addcmul_(xc, _per_head(D, sweep))
            yc = _unfold(yc, sweep.groups)
            if z is not None:
                yc = yc * F.silu(z[:, span].to(acc))
            y[:, span] = yc
            sweep.advance(S, xc, dtc, Bc, decays)
        return y, _unfold_state(S, sweep.groups, sweep.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstates):
        x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx = ctx.saved_tensors
        chunk_size, dt_softplus, dt_limit = ctx.options
        acc = ctx.acc
        dts = step_sizes(dt, dt_bias, dt_softplus, dt_limit, acc)
        sweep = _Sweep(x, dts, A, B, C, seq_idx, chunk_size, acc)
        spans = sweep.spans()
        if dy is None:
            dy = torch.zeros_like(x)

        # Forward once more, for the state that enters each chunk.
        entering = torch.empty(
            len(spans), sweep.b, sweep.n, sweep.r * sweep.head_dim, dtype=acc, device=x.device
        )
        entering[0] = _entering(sweep, initial_states)
        for c, span in enumerate(spans[:-1]):
            xc, dtc = sweep.fold(x, span), sweep.fold(dts, span)
            Bc, _ = sweep.fold_bc(span)
            entering[c + 1] = entering[c]
            decays = sweep.decays(dtc, span, with_L=False)
            sweep.advance(entering[c + 1], xc, dtc, Bc, decays)

        dx, dB, dC = torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        ddt = torch.empty_like(dts)
        dl = torch.empty_like(dts)  # gradient of dt * A
        dz = None if z is None else torch.empty_like(z)
        dD = None if D is None else torch.zeros(sweep.b, sweep.r, sweep.head_dim).to(dts)
        if dstates is None:
            dS = torch.zeros_like(entering[0])
        else:
            dS = _fold_state(dstates.to(acc), sweep.groups)

        for c in reversed(range(len(spans))):
            span, S = spans[c], entering[c]
            xc, dtc, G = sweep.fold(x, span), sweep.fold(dts, span), sweep.fold(dy, span)
            Bc, Cc = sweep.fold_bc(span)
            decays = sweep.decays(dtc, span)
            CB = torch.bmm(Cc, Bc.transpose(1, 2))
            W = torch.mul(decays.L, CB[:, None], out=sweep.buffer("W", *decays.L.shape))
            CS = torch.bmm(Cc, S).view(xc.shape)  # [b q r p]
            if z is not None:
                yc = _outputs(sweep, W, xc, dtc, CS.clone(), decays)
                if D is not None:
                    yc.addcmul_(xc, _per_head(D, sweep))
                zc = sweep.fold(z, span)
                gate = torch.sigmoid(zc)
                slope = gate * (1 + zc * (1 - gate))  # of silu
                dz[:, span] = _unfold(G * yc * slope, sweep.groups)
                G = G * (zc * gate)
            if D is not None:
                dD += (xc * G).sum(1)

            # Inside the chunk: y_i = sum_j W_ij u_j, with u = dt x.
            Gr = G.transpose(1, 2)  # [b r q p]
            u = torch.mul(xc, dtc[..., None], out=sweep.buffer("u", *xc.shape))
            T = sweep.per_head("T", Gr, u.permute(0, 2, 3, 1)).mul_(decays.L)  # dL/dCB_ij by head
            du = torch.empty_like(xc)
            du.copy_(sweep.per_head("WG", W.transpose(2, 3), Gr).transpose(1, 2))
            dCB = T.sum(1)
            M = T.mul_(CB[:, None].tril(-1))  # dL/d(cs_i - cs_j), j < i strictly
            local = (M.sum(3) - M.sum(2)).transpose(1, 2)  # [b q r]

            # Across its edges: y_i += exp(cs_i) C_i S, and S' = exp(cs_last) S + sum_j V_j B_j.
            p = decays.entry * torch.linalg.vecdot(CS, G)
            BdS = torch.bmm(Bc, dS).view(xc.shape).mul_(decays.exit[..., None])
            q = torch.linalg.vecdot(BdS, u)
            du += BdS
            Gs = (G * decays.entry[..., None]).flatten(2)  # [b q (r p)]
            V = torch.mul(u, decays.exit[..., None], out=sweep.buffer("V", *u.shape)).flatten(2)
            dCc = torch.bmm(dCB, Bc).baddbmm_(Gs, S.transpose(1, 2))
            dBc = torch.bmm(dCB.transpose(1, 2), Cc).baddbmm_(V, dS.transpose(1, 2))
            through = (dS * S).view(sweep.b, sweep.n, sweep.r, -1).sum((1, 3))  # [b r]
            through = decays.whole * through[:, None]
            dS.view(sweep.b, sweep.n, sweep.r, -1).mul_(decays.whole[..., None])
            dS.baddbmm_(Cc.transpose(1, 2), Gs)

            later = (local + p).flip(1).cumsum(1).flip(1)  # sum over i >= t
            dl[:, span] = _unfold(later + (q.cumsum(1) - q) + through, sweep.groups)
            ddt[:, span] = _unfold(torch.linalg.vecdot(xc, du), sweep.groups)
            du.mul_(dtc[..., None])
            if D is not None:
                du.addcmul_(G, _per_head(D, sweep))
            dx[:, span] = _unfold(du, sweep.groups)
            dB[:, span] = _unfold(dBc[:, :, None], sweep.groups)
            dC[:, span] = _unfold(dCc[:, :, None], sweep.groups)

        ddt.addcmul_(dl, A.to(acc))
        dA = (dl * dts).sum((0, 1)).to(A.dtype)
        with torch.enable_grad():
            dt = dt.detach().requires_grad_()
            leaves = [dt] if dt_bias is None else [dt, dt_bias.detach().requires_grad_()]
            dts = step_sizes(*leaves, *([None] * (2 - len(leaves))), dt_softplus, dt_limit, acc)
        ddt, ddt_bias = (*torch.autograd.grad(dts, leaves, ddt), None)[:2]
        if D is not None:
            dD = dD.view(sweep.batch, sweep.heads, -1).sum(0)
            dD = (dD if D.ndim == 2 else dD.sum(1)).to(D.dtype)
        dinitial = None
        if initial_states is not None:
            dinitial = _unfold_state(dS, sweep.groups, sweep.heads).to(initial_states.dtype)
        return dx, ddt, dA, dB, dC, dD, dz, dinitial, ddt_bias, None, None


def _entering(sweep: _Sweep, initial_states: Tensor | None) -> Tensor:
    """The state before the first token, [b n (r p)]."""
    if initial_states is None:
        shape = (sweep.b, sweep.n, sweep.r * sweep.head_dim)
        return torch.zeros(shape, dtype=sweep.acc, device=sweep.x.device)
    return _fold_state(initial_states.to(sweep.acc), sweep.groups).clone()


def _per_head(D: Tensor, sweep: _Sweep) -> Tensor:
    """D as it multiplies x of a chunk, [b 1 r p or 1]."""
    D = D.to(sweep.acc).view(1, sweep.groups, 1, sweep.r, -1)
    return D.expand(sweep.batch, -1, -1, -1, -1).flatten(0, 1)


def _outputs(
    sweep: _Sweep, W: Tensor, x: Tensor, dt: Tensor, CS: Tensor, decays: _Decays
) -> Tensor:
    """y of a chunk before skip and gate, [b q r p], written over CS = C S."""
    u = torch.mul(x, dt[..., None], out=sweep.buffer("u", *x.shape))
    inside = sweep.per_head("inside", W, u.transpose(1, 2))  # [b r q p]
    return CS.mul_(decays.entry[..., None]).add_(inside.transpose(1, 2))
