"""The fused backward, in two launches (three where the sequences are cut into segments).

A light sweep in both directions stores the state that enters each tile and the gradient of the one
that leaves it. Then all tiles are independent: a program owns one tile and some heads of a group,
and adds their shares of dB and dC before it writes them. No atomics, so the result is
deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.ssd.fused_forward import states_kernel
from ysnake_kernels.ssd.fused_tiles import (
    arithmetic,
    at,
    constants,
    decays,
    device,
    dot,
    launch,
    load_state,
    load_tile,
    segments,
    sequence,
    sigmoid,
    slot_of,
    step_sizes,
    store_tile,
    view,
)


@triton.jit(do_not_specialize=["length", "slots"])
def gradients_kernel(
    x, dt, A, B, C, D, z, dt_bias, dy, tiles, dx, ddt, dB, dC, dz, sums,
    seq_idx, cu_seqlens, owner, length, slots, batch, heads, per_group, per_program,
    P: tl.constexpr, N: tl.constexpr, D_PER_CHANNEL: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    Q: tl.constexpr, PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """A program owns one tile and `per_program` heads of a group; `sums` gets the tile's shares of
    dA, of ddt_bias and, behind them, of dD by channel."""
    splits = per_group // per_program
    groups = heads // per_group
    pid = tl.program_id(0)
    split, group, slot = pid % splits, pid // splits % groups, pid // (splits * groups)
    seq = slot // tl.cdiv(length, Q) if owner is None else tl.load(owner + slot)
    row, start, end = sequence(seq, length, cu_seqlens)
    t0 = start + (slot - slot_of(seq, start, length, cu_seqlens, Q)) * Q
    if t0 >= end:  # a gap between packed sequences
        return
    q, n = tl.arange(0, Q), tl.arange(0, N2)
    inside = t0 + q < end
    i, j = q[:, None], q[None, :]

    B_ = load_tile(B, row, t0, group, q, end, n, N)  # [Q, N2]
    C_ = load_tile(C, row, t0, group, q, end, n, N)
    CB = dot(C_, tl.trans(B_), DOT, PRECISION)  # [i, j]
    dCB = tl.zeros([Q, Q], ACC)
    dC_ = tl.zeros([Q, N2], ACC)
    dB_ = tl.zeros([Q, N2], ACC)
    for r in range(per_program):
        head = group * per_group + split * per_program + r
        a = tl.load(A + head).to(ACC)
        step, slope = step_sizes(dt, dt_bias, row, t0, head, q, end, ACC, SOFTPLUS, LOW, HIGH)
        cs, entry, exit, whole, doc = decays(step * a, seq_idx, row, length, t0, q, start, end, Q)
        seen = (j <= i) & (doc[:, None] == doc[None, :])
        L = tl.exp(tl.where(seen, cs[:, None] - cs[None, :], float("-inf")))  # [i, j]
        into = tl.zeros([Q], ACC)  # what reaches a token from before it, minus what it sends on
        onward = tl.zeros([Q], ACC)  # what a token sends to the leaving state
        through = tl.zeros([], ACC)  # from the entering to the leaving state
        dstep = tl.zeros([Q], ACC)
        for first in tl.static_range(0, P2, PS):
            p = first + tl.arange(0, PS)
            x_ = load_tile(x, row, t0, head, q, end, p, P)  # [Q, PS]
            G = load_tile(dy, row, t0, head, q, end, p, P)
            S = load_state(tiles, slot, head, heads, p, n, P, N)  # [PS, N2]
            dS = load_state(tiles, slots + slot, head, heads, p, n, P, N)
            if D is not None:
                if D_PER_CHANNEL:
                    d = tl.load(D + head * P + p, mask=p < P, other=0.0).to(ACC)[None, :]
                else:
                    d = tl.load(D + head).to(ACC)
            if z is not None:
                y = dot(CB * L * step[None, :], x_, DOT, PRECISION)
                y += dot(C_, tl.trans(S), DOT, PRECISION) * entry[:, None]
                if D is not None:
                    y += x_.to(ACC) * d
                z_ = load_tile(z, row, t0, head, q, end, p, P).to(ACC)
                gate = sigmoid(z_)
                dz_ = G.to(ACC) * y * gate * (1.0 + z_ * (1.0 - gate))
                store_tile(dz, row, t0, head, q, end, p, dz_, P)
                G = G.to(ACC) * z_ * gate

            # inside the tile: y_i = sum_j (C_i . B_j) L_ij step_j x_j
            T = dot(G, tl.trans(x_), DOT, PRECISION) * L * step[None, :]
            dCB += T
            M = tl.where(j < i, T * CB, 0.0)  # gradient of cs_i - cs_j
            into += tl.sum(M, 1) - tl.sum(M, 0)
            du = dot(tl.trans(CB * L), G, DOT, PRECISION)  # of u = step x
            # across its edges: y_i += entry_i C_i S, and S' = whole S + sum_j exit_j B_j u_j
            SG = dot(G.to(ACC) * entry[:, None], S, DOT, PRECISION)  # [Q, N2]
            into += tl.sum(SG * C_.to(ACC), 1)
            dC_ += SG
            du += dot(B_, tl.trans(dS), DOT, PRECISION) * exit[:, None]
            Su = dot(x_.to(ACC) * (step * exit)[:, None], dS, DOT, PRECISION)  # [Q, N2]
            onward += tl.sum(Su * B_.to(ACC), 1)
            dB_ += Su
            through += tl.sum(tl.sum(S.to(ACC) * dS.to(ACC), 1), 0)

            dstep += tl.sum(x_.to(ACC) * du, 1)
            du *= step[:, None]
            if D is not None:
                du += G.to(ACC) * d
                dD = tl.sum(x_.to(ACC) * G.to(ACC), 0)
                at_sum = sums + (slot.to(tl.int64) * heads + head) * WIDTH + 2
                tl.store(at_sum + p, dD, mask=p < P)
            store_tile(dx, row, t0, head, q, end, p, du, P)

        # l_t = step_t a scales all that passes from before t to t or later
        passed = tl.sum(tl.where(i >= j, into[:, None], onward[:, None]), 0) + whole * through
        dstep = (dstep + a * passed) * slope
        tl.store(
            at(ddt, row, t0, head) + q * ddt.token, dstep.to(ddt.data.dtype.element_ty), mask=inside
        )
        at_sum = sums + (slot.to(tl.int64) * heads + head) * WIDTH
        tl.store(at_sum, tl.sum(step * passed, 0))
        tl.store(at_sum + 1, tl.sum(dstep, 0))

    dC_ += dot(dCB, B_, DOT, PRECISION)
    dB_ += dot(tl.trans(dCB), C_, DOT, PRECISION)
    store_tile(dC, split * batch + row, t0, group, q, end, n, dC_, N)
    store_tile(dB, split * batch + row, t0, group, q, end, n, dB_, N)


def splits_of_group(programs: int, per_group: int, multiprocessors: int) -> int:
    """Among how many programs the heads of a group are shared: no more than fill the GPU, since
    each writes its own dB and dC."""
    divisors = (d for d in range(1, per_group + 1) if per_group % d == 0)
    return next((d for d in divisors if programs * d >= 2 * multiprocessors), per_group)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, initial_states, dt_bias; None for what is absent."""
    batch, length, heads, P = x.shape
    groups, N = B.shape[2:]
    per_group = heads // groups
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    numbers = arithmetic(x, B, C, dt, A, D, z, initial_states, dt_bias)
    given = constants(x, B, numbers, softplus, low, high)
    family, multiprocessors = device(x)
    sweep, main = launch("states", family, given), launch("gradients", family, given)
    Q = sweep["Q"] = main["Q"]
    exact = torch.float64 if given["ACC"] == tl.float64 else torch.float32
    stored = {tl.float64: torch.float64, tl.float32: torch.float32, tl.bfloat16: torch.bfloat16}

    def empty(*shape: int, dtype: torch.dtype = exact) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    if cu_seqlens is None:
        slots, owner = batch * triton.cdiv(length, Q), None
    else:
        slots = length // Q + sequences
        index = torch.arange(slots, device=x.device)
        owner = torch.searchsorted(cu_seqlens[:-1] // Q + index[:sequences], index, right=True) - 1
    tiles = empty(2, slots, heads, P, N, dtype=stored[given["DOT"]])
    slices = given["P2"] // sweep["PS"]
    count = segments(sequences, 2 * heads, slices, length, multiprocessors)
    dinitial = None if initial_states is None else torch.empty_like(initial_states)
    ends = whole = None
    if count > 1:
        ends, whole = empty(2, sequences, count, heads, P, N), empty(sequences, count, heads)

    splits = splits_of_group(slots * groups, per_group, multiprocessors)
    dx, ddt = torch.empty(x.shape, dtype=x.dtype, device=x.device), empty(*dt.shape, dtype=dt.dtype)
    dz = None if z is None else empty(*z.shape, dtype=z.dtype)
    dB, dC = (
        empty(splits * batch, *t.shape[1:], dtype=t.dtype if splits == 1 else exact) for t in (B, C)
    )
    width = 2 if D is None else 2 + P
    sums = torch.zeros(slots, heads, width, dtype=exact, device=x.device)

    with torch.cuda.device_of(x):
        for pass_tiles in [tiles] if count == 1 else [None, tiles]:
            states_kernel[(2 * sequences * count * heads * slices,)](
                view(x), view(dt), A, view(B), view(C), view(z), dt_bias, view(dy), initial_states,
                dfinal, dinitial, ends, whole, pass_tiles, seq_idx, cu_seqlens, length, slots,
                heads, per_group, sequences, SEGMENTS=count, **given, **sweep,
            )  # fmt: skip
        gradients_kernel[(slots * groups * splits,)](
            view(x), view(dt), A, view(B), view(C), D, view(z), dt_bias, view(dy), tiles,
            view(dx), view(ddt), view(dB), view(dC), view(dz), sums,
            seq_idx, cu_seqlens, owner, length, slots, batch, heads, per_group,
            per_group // splits, D_PER_CHANNEL=D is not None and D.ndim == 2, WIDTH=width,
            **given, **main,
        )  # fmt: skip

    if splits > 1:
        dB, dC = (d.view(splits, *t.shape).sum(0).to(t.dtype) for d, t in ((dB, B), (dC, C)))
    dA = sums[:, :, 0].sum(0).to(A.dtype)
    ddt_bias = None if dt_bias is None else sums[:, :, 1].sum(0).to(dt_bias.dtype)
    dD = None if D is None else sums[:, :, 2:].sum(0 if D.ndim == 2 else (0, 2)).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dinitial, ddt_bias
