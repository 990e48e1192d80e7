"""The fused backward, in three launches (four where the sequences are cut into segments).

A light sweep in both directions stores, for every chunk of CHUNK tokens, the state that enters
it and the gradient of the state that leaves it. Then all tiles are independent: a program owns one
tile and some heads of a group, as rows i of the chunk's quadratic form (dC, dz) or as its columns
j (dx, dB), and adds the heads' shares of dC or dB before it writes them. A last small kernel turns
what passes through each token into the gradients of dt and A. No atomics: deterministic.

With G = dy silu(z), u = step x, S the entering state, dS the leaving state's gradient and

    y_i = entry_i C_i S + sum_(j<=i) (C_i . B_j) L_ij u_j        S' = whole S + sum_j exit_j B_j u_j

the flow from token j to token i, the gradient of cs_i - cs_j, is M_ij = (C_i . B_j) L_ij G_i . u_j.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.ssd.fused_forward import states_kernel
from ysnake_kernels.ssd.fused_tiles import (
    DECAY,
    DSTEP,
    INTO,
    ONWARD,
    SENT,
    STEP,
    arithmetic,
    at,
    constants,
    device,
    dot,
    launch,
    load_plane,
    load_state,
    load_tile,
    segments,
    sequence,
    sigmoid,
    slot_of,
    step_sizes,
    store_plane,
    store_tile,
    view,
)


@triton.jit
def load_gated(dy, z, row, t0, head, q, end, p, P: tl.constexpr, ACC: tl.constexpr):
    """The gradient of y before the gate, [Q, PS]."""
    G = load_tile(dy, row, t0, head, q, end, p, P)
    if z is not None:
        z_ = load_tile(z, row, t0, head, q, end, p, P).to(ACC)
        G = G.to(ACC) * z_ * sigmoid(z_)
    return G


@triton.jit
def load_skip(D, head, p, P: tl.constexpr, PER_CHANNEL: tl.constexpr, ACC: tl.constexpr):
    """D as it multiplies a tile, [1, PS]."""
    at_channel = D + head * P + p if PER_CHANNEL else D + head + p * 0
    return tl.load(at_channel, mask=p < P, other=0.0).to(ACC)[None, :]


@triton.jit
def inner(
    tiles, slot, slots, head, heads,
    P: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr,
    PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """<S, dS>, read in narrow strips: it shares its registers with sums that are wide."""
    total = tl.zeros([], ACC)
    for p0 in range(0, P2, PS):
        p = p0 + tl.arange(0, PS)
        for n0 in range(0, N2, 16):
            n = n0 + tl.arange(0, 16)
            S = load_state(tiles, slot, head, heads, p, n, P, N).to(ACC)
            dS = load_state(tiles, slots + slot, head, heads, p, n, P, N).to(ACC)
            total += tl.sum(tl.sum(S * dS, 1), 0)
    return total


# Of B and C a program needs one tile for every head. Loaded once, it would hold its registers
# through the loop over heads and push others out to memory; later heads find it in the cache.
@triton.jit
def products(
    own, other, row, t0, c0, group, q, k, end, n, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C_i . B_j of a tile with its chunk, [Q, CHUNK]."""
    own_ = load_tile(own, row, t0, group, q, end, n, N)
    other_ = load_tile(other, row, c0, group, k, end, n, N)
    return dot(own_, tl.trans(other_), DOT, PRECISION)


@triton.jit
def rows(
    x, B, C, D, z, dy, tiles, dC, dz, scratch, seq_idx, row, c0, t0, start, end, slot, split, group,
    length, batch, heads, per_group, per_program,
    P: tl.constexpr, N: tl.constexpr, D_PER_CHANNEL: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, CHUNK: tl.constexpr, PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """dC, dz and the flow into the tokens t0 + q of a chunk that starts at c0."""
    q, k, n = tl.arange(0, Q), tl.arange(0, CHUNK), tl.arange(0, N2)
    ti, tj = t0 + q, c0 + k
    later = ti[:, None] > tj[None, :]
    seen = (ti[:, None] >= tj[None, :]) & (ti < end)[:, None]
    if seq_idx is not None:
        docs = seq_idx + row.to(tl.int64) * length
        doc = tl.load(docs + tl.minimum(ti, end - 1))
        seen &= doc[:, None] == tl.load(docs + tl.minimum(tj, end - 1))[None, :]
        entering = doc == tl.load(docs + tl.maximum(c0 - 1, start))
    CB = products(C, B, row, t0, c0, group, q, k, end, n, N, DOT, PRECISION)  # [i, j]
    dCB = tl.zeros([Q, CHUNK], ACC)
    dC_ = tl.zeros([Q, N2], ACC)
    for r in range(per_program):
        head = group * per_group + split * per_program + r
        cs_i = load_plane(scratch, DECAY, row, batch, head, heads, length, ti, end)
        cs_j = load_plane(scratch, DECAY, row, batch, head, heads, length, tj, end)
        L = tl.exp(tl.where(seen, cs_i[:, None] - cs_j[None, :], float("-inf")))
        L *= load_plane(scratch, STEP, row, batch, head, heads, length, tj, end)[None, :]
        entry = tl.exp(cs_i)
        if seq_idx is not None:
            entry = tl.where(entering, entry, 0.0)
        into = tl.zeros([Q], ACC)
        for first in range(0, P2, PS):
            p = first + tl.arange(0, PS)
            S = load_state(tiles, slot, head, heads, p, n, P, N)  # [PS, N2]
            x_ = load_tile(x, row, c0, head, k, end, p, P)  # [CHUNK, PS]
            C_ = load_tile(C, row, t0, group, q, end, n, N)  # [Q, N2]
            y = dot(C_, tl.trans(S), DOT, PRECISION) * entry[:, None]  # [Q, PS]
            G = load_gated(dy, z, row, t0, head, q, end, p, P, ACC)  # [Q, PS]
            into += tl.sum(y * G.to(ACC), 1)
            dC_ = dot(G.to(ACC) * entry[:, None], S, DOT, PRECISION, dC_)
            T = dot(G, tl.trans(x_), DOT, PRECISION) * L  # gradient of C_i . B_j, [i, j]
            dCB += T
            into += tl.sum(tl.where(later, T * CB, 0.0), 1)
            if z is not None:
                y = dot(CB * L, x_, DOT, PRECISION, y)
                if D is not None:
                    skipped = load_tile(x, row, t0, head, q, end, p, P).to(ACC)
                    y += skipped * load_skip(D, head, p, P, D_PER_CHANNEL, ACC)
                z_ = load_tile(z, row, t0, head, q, end, p, P).to(ACC)
                gate = sigmoid(z_)
                slope = gate * (1.0 + z_ * (1.0 - gate))
                dy_ = load_tile(dy, row, t0, head, q, end, p, P).to(ACC)
                store_tile(dz, row, t0, head, q, end, p, dy_ * y * slope, P)
        store_plane(into, scratch, INTO, row, batch, head, heads, length, ti, end)
    B_all = load_tile(B, row, c0, group, k, end, n, N)  # [CHUNK, N2]
    dC_ = dot(dCB, B_all, DOT, PRECISION, dC_)
    store_tile(dC, split * batch + row, t0, group, q, end, n, dC_, N)


@triton.jit
def columns(
    x, B, C, D, z, dy, tiles, dx, dB, dD, through, scratch, seq_idx,
    row, c0, t0, start, end, slot, slots, split, group,
    length, batch, heads, per_group, per_program,
    P: tl.constexpr, N: tl.constexpr, D_PER_CHANNEL: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, CHUNK: tl.constexpr, PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """dx, dB, dD and the flow out of the tokens t0 + q; the chunk's first tile also gets the flow
    through the chunk, from its entering to its leaving state."""
    q, k, n = tl.arange(0, Q), tl.arange(0, CHUNK), tl.arange(0, N2)
    tj, ti = t0 + q, c0 + k
    last = tl.minimum(c0 + CHUNK, end) - 1
    later = tj[:, None] < ti[None, :]
    seen = (tj[:, None] <= ti[None, :]) & (ti < end)[None, :]
    if seq_idx is not None:
        docs = seq_idx + row.to(tl.int64) * length
        doc = tl.load(docs + tl.minimum(tj, end - 1))
        seen &= doc[:, None] == tl.load(docs + tl.minimum(ti, end - 1))[None, :]
        leaving = tl.load(docs + last)
        entering = tl.load(docs + tl.maximum(c0 - 1, start))
    CB = products(B, C, row, t0, c0, group, q, k, end, n, N, DOT, PRECISION)  # [j, i]
    dCB = tl.zeros([Q, CHUNK], ACC)
    dB_ = tl.zeros([Q, N2], ACC)
    for r in range(per_program):
        head = group * per_group + split * per_program + r
        cs_j = load_plane(scratch, DECAY, row, batch, head, heads, length, tj, end)
        cs_i = load_plane(scratch, DECAY, row, batch, head, heads, length, ti, end)
        total = load_plane(scratch, DECAY, row, batch, head, heads, length, last, end)
        step = load_plane(scratch, STEP, row, batch, head, heads, length, tj, end)
        L = tl.exp(tl.where(seen, cs_i[None, :] - cs_j[:, None], float("-inf")))  # [j, i]
        exit = tl.exp(tl.minimum(total - cs_j, 0.0))
        if seq_idx is not None:
            exit = tl.where(doc == leaving, exit, 0.0)
        sent, onward, dstep = tl.zeros([Q], ACC), tl.zeros([Q], ACC), tl.zeros([Q], ACC)
        for first in range(0, P2, PS):
            p = first + tl.arange(0, PS)
            x_ = load_tile(x, row, t0, head, q, end, p, P)  # [Q, PS]
            G = load_gated(dy, z, row, c0, head, k, end, p, P, ACC)  # [CHUNK, PS]
            T = dot(x_, tl.trans(G), DOT, PRECISION) * L * step[:, None]  # of C_i . B_j
            dCB += T
            sent += tl.sum(tl.where(later, T * CB, 0.0), 1)
            du = dot(CB * L, G, DOT, PRECISION)
            dS = load_state(tiles, slots + slot, head, heads, p, n, P, N)  # [PS, N2]
            B_ = load_tile(B, row, t0, group, q, end, n, N)  # [Q, N2]
            dB_ = dot(x_.to(ACC) * (step * exit)[:, None], dS, DOT, PRECISION, dB_)
            edge = dot(B_, tl.trans(dS), DOT, PRECISION) * exit[:, None]  # [Q, PS]
            onward += tl.sum(x_.to(ACC) * edge, 1) * step
            du += edge
            dstep += tl.sum(x_.to(ACC) * du, 1)
            du *= step[:, None]
            if D is not None:
                skipped = load_gated(dy, z, row, t0, head, q, end, p, P, ACC).to(ACC)
                du += skipped * load_skip(D, head, p, P, D_PER_CHANNEL, ACC)
                share = slot * (CHUNK // Q) + (t0 - c0) // Q
                at_channel = dD + (share.to(tl.int64) * heads + head) * P + p
                tl.store(at_channel, tl.sum(skipped * x_.to(ACC), 0), mask=p < P)
            store_tile(dx, row, t0, head, q, end, p, du, P)
        store_plane(sent, scratch, SENT, row, batch, head, heads, length, tj, end)
        store_plane(onward, scratch, ONWARD, row, batch, head, heads, length, tj, end)
        store_plane(dstep, scratch, DSTEP, row, batch, head, heads, length, tj, end)
    C_all = load_tile(C, row, c0, group, k, end, n, N)  # [CHUNK, N2]
    dB_ = dot(dCB, C_all, DOT, PRECISION, dB_)
    store_tile(dB, split * batch + row, t0, group, q, end, n, dB_, N)

    if t0 == c0:
        for r in range(per_program):
            head = group * per_group + split * per_program + r
            total = load_plane(scratch, DECAY, row, batch, head, heads, length, last, end)
            flow = inner(tiles, slot, slots, head, heads, P, N, ACC, PS, P2, N2) * tl.exp(total)
            if seq_idx is not None:
                flow = tl.where(entering == leaving, flow, 0.0)
            tl.store(through + slot.to(tl.int64) * heads + head, flow)


@triton.jit
def chunk_of(slot, owner, length, cu_seqlens, CHUNK: tl.constexpr):
    """Of the chunk in a slot: row of the batch, first token, its sequence's start and end."""
    seq = slot // tl.cdiv(length, CHUNK) if owner is None else tl.load(owner + slot).to(tl.int32)
    row, start, end = sequence(seq, length, cu_seqlens)
    return row, start + (slot - slot_of(seq, start, length, cu_seqlens, CHUNK)) * CHUNK, start, end


@triton.jit(do_not_specialize=["length", "slots"])
def gradients_kernel(
    x, B, C, D, z, dy, tiles, dx, dB, dC, dz, dD, through, scratch, seq_idx, cu_seqlens, owner,
    length, slots, batch, heads, per_group, per_program,
    P: tl.constexpr, N: tl.constexpr, D_PER_CHANNEL: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, CHUNK: tl.constexpr, PS: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """A program owns `per_program` heads of a group and a tile, as rows or as columns."""
    splits, groups = per_group // per_program, heads // per_group
    pid = tl.program_id(0)
    tile = pid // 2 % (CHUNK // Q)
    outer = pid // (2 * (CHUNK // Q))
    split, group, slot = outer % splits, outer // splits % groups, outer // (splits * groups)
    row, c0, start, end = chunk_of(slot, owner, length, cu_seqlens, CHUNK)
    t0 = c0 + tile * Q
    if t0 >= end:  # behind the sequence
        return
    if pid % 2 == 0:
        rows(
            x, B, C, D, z, dy, tiles, dC, dz, scratch, seq_idx,
            row, c0, t0, start, end, slot, split, group,
            length, batch, heads, per_group, per_program,
            P, N, D_PER_CHANNEL, ACC, DOT, PRECISION, Q, CHUNK, PS, P2, N2,
        )  # fmt: skip
    else:
        columns(
            x, B, C, D, z, dy, tiles, dx, dB, dD, through, scratch, seq_idx,
            row, c0, t0, start, end, slot, slots, split, group,
            length, batch, heads, per_group, per_program,
            P, N, D_PER_CHANNEL, ACC, DOT, PRECISION, Q, CHUNK, PS, P2, N2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def steps_kernel(
    dt, A, dt_bias, ddt, through, sums, scratch, cu_seqlens, owner, length, batch, heads,
    ACC: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """ddt, and a chunk's shares of dA and ddt_bias: the log decay of a token scales all that flows
    from before it to itself or later, summed so that no flow is counted and taken off again."""
    head, slot = tl.program_id(0) % heads, tl.program_id(0) // heads
    row, t0, _, end = chunk_of(slot, owner, length, cu_seqlens, CHUNK)
    if t0 >= end:
        return
    k = tl.arange(0, CHUNK)
    inside = t0 + k < end
    step, slope = step_sizes(dt, dt_bias, row, t0, head, k, end, ACC, SOFTPLUS, LOW, HIGH)
    into = load_plane(scratch, INTO, row, batch, head, heads, length, t0 + k, end)
    into -= load_plane(scratch, SENT, row, batch, head, heads, length, t0 + k, end)
    onward = load_plane(scratch, ONWARD, row, batch, head, heads, length, t0 + k, end)
    dstep = load_plane(scratch, DSTEP, row, batch, head, heads, length, t0 + k, end)
    at_sum = slot.to(tl.int64) * heads + head
    flow = tl.where(k[:, None] >= k[None, :], into[:, None], onward[:, None])
    flow = tl.sum(flow, 0) + tl.load(through + at_sum)
    dstep = (dstep + flow * tl.load(A + head).to(ACC)) * slope
    offsets = at(ddt, row, t0, head) + k * ddt.token
    tl.store(offsets, dstep.to(ddt.data.dtype.element_ty), mask=inside)
    tl.store(sums + at_sum * 2, tl.sum(step * flow, 0))
    tl.store(sums + at_sum * 2 + 1, tl.sum(dstep, 0))


def splits_of_group(programs: int, per_group: int, multiprocessors: int) -> int:
    """Among how many programs the heads of a group are shared: no more than fill the GPU, since
    each writes its own dB and dC."""
    divisors = (d for d in range(1, per_group + 1) if per_group % d == 0)
    return next((d for d in divisors if programs * d >= 2 * multiprocessors), per_group)


def backward(
    dy, dfinal, x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens,
    softplus: bool, low: float, high: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, initial_states, dt_bias; None for what is absent."""
    batch, length, heads, P = x.shape
    groups, N = B.shape[2:]
    per_group = heads // groups
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    numbers = arithmetic(x, B, C, dt, A, D, z, initial_states, dt_bias)
    given = constants(x, B, numbers, softplus, low, high)
    family, multiprocessors = device(x)
    sweep, main = launch("states", family, given), launch("gradients", family, given)
    chunk = sweep["CHUNK"] = main["CHUNK"]
    exact = torch.float64 if given["ACC"] == tl.float64 else torch.float32
    stored = {tl.float64: torch.float64, tl.float32: torch.float32, tl.bfloat16: torch.bfloat16}

    def empty(*shape: int, dtype: torch.dtype = exact) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    if cu_seqlens is None:
        slots, owner = batch * triton.cdiv(length, chunk), None
    else:
        slots = length // chunk + sequences
        index = torch.arange(slots, device=x.device)
        firsts = cu_seqlens[:-1] // chunk + index[:sequences]
        owner = torch.searchsorted(firsts, index, right=True) - 1
    slices = given["P2"] // sweep["PS"]
    count = segments(sequences, 2 * heads, slices, length, multiprocessors)
    shares = slots * (chunk // main["Q"])
    splits = splits_of_group(2 * shares * groups, per_group, multiprocessors)

    ends, whole = empty(2, sequences, count, heads, P, N), empty(sequences, count, heads)
    tiles = empty(2, slots, heads, P, N, dtype=stored[given["DOT"]])
    scratch = empty(6, batch, heads, length)
    through = empty(slots, heads)
    sums = torch.zeros(slots, heads, 2, dtype=exact, device=x.device)
    dD = None if D is None else torch.zeros(shares, heads, P, dtype=exact, device=x.device)
    dx, ddt = empty(*x.shape, dtype=x.dtype), empty(*dt.shape, dtype=dt.dtype)
    dz = None if z is None else empty(*z.shape, dtype=z.dtype)
    dinitial = None if initial_states is None else torch.empty_like(initial_states)
    dB, dC = (
        empty(splits * batch, *t.shape[1:], dtype=t.dtype if splits == 1 else exact) for t in (B, C)
    )
    options = {k: given.pop(k) for k in ("SOFTPLUS", "LOW", "HIGH")}

    with torch.cuda.device_of(x):
        for stored_states in [tiles] if count == 1 else [None, tiles]:
            states_kernel[(2 * sequences * count * heads * slices,)](
                view(x), view(dt), A, view(B), view(C), view(z), dt_bias, view(dy), initial_states,
                dfinal, dinitial, ends, whole, stored_states, scratch, seq_idx, cu_seqlens, length,
                slots, heads, per_group, sequences, batch, SEGMENTS=count,
                **given, **options, **sweep,
            )  # fmt: skip
        gradients_kernel[(2 * shares * groups * splits,)](
            view(x), view(B), view(C), D, view(z), view(dy), tiles, view(dx), view(dB), view(dC),
            view(dz), dD, through, scratch, seq_idx, cu_seqlens, owner,
            length, slots, batch, heads, per_group, per_group // splits,
            D_PER_CHANNEL=D is not None and D.ndim == 2, **given, **main,
        )  # fmt: skip
        steps_kernel[(slots * heads,)](
            view(dt), A, dt_bias, view(ddt), through, sums, scratch, cu_seqlens, owner,
            length, batch, heads, ACC=given["ACC"], CHUNK=chunk, **options,
        )  # fmt: skip

    if splits > 1:
        dB, dC = (d.view(splits, *t.shape).sum(0).to(t.dtype) for d, t in ((dB, B), (dC, C)))
    dA = sums[:, :, 0].sum(0).to(A.dtype)
    ddt_bias = None if dt_bias is None else sums[:, :, 1].sum(0).to(dt_bias.dtype)
    dD = None if D is None else dD.sum(0 if D.ndim == 2 else (0, 2)).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dinitial, ddt_bias
