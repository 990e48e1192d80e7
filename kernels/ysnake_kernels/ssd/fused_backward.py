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

from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd import fused_tiles as ft
from ysnake_kernels.ssd.fused_forward import DECAY, DSTEP, INTO, ONWARD, SENT, STEP, states_kernel
from ysnake_kernels.ssd.fused_tiles import device, segments
from ysnake_kernels.triton_math import ROUND_ONCE


@triton.jit
def inner(states, dstates, slot, head, heads, K):
    """<S, dS>, read in narrow strips: it shares its registers with sums that are wide."""
    total = tl.zeros([], K.ACC)
    for p0 in range(0, K.P2, K.PS):
        p = p0 + tl.arange(0, K.PS)
        for n0 in range(0, K.N2, 16):
            n = n0 + tl.arange(0, 16)
            S = ft.load_state(states, slot, head, heads, p, n, K).to(K.ACC)
            dS = ft.load_state(dstates, slot, head, heads, p, n, K).to(K.ACC)
            total += tl.sum(tl.sum(S * dS, 1), 0)
    return total


@triton.jit
def rows(scan, dy, states, dC, dz, scratch, tile, chunk, slot, share, group, first_head, count, K):
    """dC, dz and the flow into the tokens of a tile, from the chunk's entering state on."""
    n, heads = tl.arange(0, K.N2), scan.heads
    ti, tj = tile.t0 + tile.q, chunk.t0 + chunk.q
    later = ti[:, None] > tj[None, :]
    seen = (ti[:, None] >= tj[None, :]) & ft.inside(tile)[:, None]
    if scan.seq_idx is not None:
        doc = ft.document(scan, tile, ti)
        seen &= doc[:, None] == ft.document(scan, tile, tj)[None, :]
        entered = doc == ft.document(scan, tile, tl.maximum(chunk.t0 - 1, tile.start))
    # B and C are loaded where they are used, and again for each head, from the cache: held through
    # the loop they would push others out of the registers
    C_i, B_j = ft.load_tile(scan.C, tile, group, n, K.N), ft.load_tile(scan.B, chunk, group, n, K.N)
    CB = ft.dot(C_i, tl.trans(B_j), K)  # [i, j]
    dCB = tl.zeros([K.Q, K.CHUNK], K.ACC)
    dC_ = tl.zeros([K.Q, K.N2], K.ACC)
    for r in range(count):
        head = first_head + r
        cs_i = ft.load_row(scratch, tile, head, DECAY)
        cs_j = ft.load_row(scratch, chunk, head, DECAY)
        L = tl.exp(tl.where(seen, cs_i[:, None] - cs_j[None, :], float("-inf")))
        L *= ft.load_row(scratch, chunk, head, STEP)[None, :]
        entry = tl.exp(cs_i)
        if scan.seq_idx is not None:
            entry = tl.where(entered, entry, 0.0)
        into = tl.zeros([K.Q], K.ACC)
        for p0 in range(0, K.P2, K.PS):
            p = p0 + tl.arange(0, K.PS)
            S = ft.load_state(states, slot, head, heads, p, n, K)  # [PS, N2]
            x_ = ft.load_tile(scan.x, chunk, head, p, K.P)  # [CHUNK, PS]
            C_ = ft.load_tile(scan.C, tile, group, n, K.N)  # [Q, N2]
            y = ft.dot(C_, tl.trans(S), K) * entry[:, None]  # [Q, PS]
            G = ft.load_gated(scan, dy, tile, head, p, K)  # [Q, PS]
            into += tl.sum(y * G.to(K.ACC), 1)
            dC_ = ft.dot(G.to(K.ACC) * entry[:, None], S, K, dC_)
            T = ft.dot(G, tl.trans(x_), K) * L  # gradient of C_i . B_j, [i, j]
            dCB += T
            into += tl.sum(tl.where(later, T * CB, 0.0), 1)
            if scan.z is not None:
                y = ft.dot(CB * L, x_, K, y)
                if scan.D is not None:
                    skipped = ft.load_tile(scan.x, tile, head, p, K.P).to(K.ACC)
                    y += skipped * ft.load_skip(scan.D, head, p, K)
                z = ft.load_tile(scan.z, tile, head, p, K.P).to(K.ACC)
                gate = tl.sigmoid(z)
                slope = gate * (1.0 + z * (1.0 - gate))
                dy_ = ft.load_tile(dy, tile, head, p, K.P).to(K.ACC)
                ft.store_tile(dy_ * y * slope, dz, tile, head, p, K.P)
        ft.store_row(into, scratch, tile, head, INTO)
    B_all = ft.load_tile(scan.B, chunk, group, n, K.N)  # [CHUNK, N2]
    ft.store_tile(ft.dot(dCB, B_all, K, dC_), dC, tile, share, n, K.N)


@triton.jit
def columns(
    scan, dy, states, dstates, dx, dB, dD, through, scratch,
    tile, chunk, slot, share, group, first_head, count, K,
):  # fmt: skip
    """dx, dB, dD and the flow out of the tokens of a tile; the chunk's first tile also gets the
    flow through the chunk, from its entering to its leaving state."""
    n, heads = tl.arange(0, K.N2), scan.heads
    tj, ti = tile.t0 + tile.q, chunk.t0 + chunk.q
    last = ft.move(tile, tl.minimum(chunk.t0 + K.CHUNK, tile.end) - 1, tl.arange(0, 1))
    later = tj[:, None] < ti[None, :]
    seen = (tj[:, None] <= ti[None, :]) & ft.inside(chunk)[None, :]
    if scan.seq_idx is not None:
        doc = ft.document(scan, tile, tj)
        seen &= doc[:, None] == ft.document(scan, tile, ti)[None, :]
        left = ft.document(scan, tile, last.t0)
        entered = ft.document(scan, tile, tl.maximum(chunk.t0 - 1, tile.start))
    B_j, C_i = ft.load_tile(scan.B, tile, group, n, K.N), ft.load_tile(scan.C, chunk, group, n, K.N)
    CB = ft.dot(B_j, tl.trans(C_i), K)  # [j, i]
    dCB = tl.zeros([K.Q, K.CHUNK], K.ACC)
    dB_ = tl.zeros([K.Q, K.N2], K.ACC)
    for r in range(count):
        head = first_head + r
        cs_j = ft.load_row(scratch, tile, head, DECAY)
        cs_i = ft.load_row(scratch, chunk, head, DECAY)
        step = ft.load_row(scratch, tile, head, STEP)
        L = tl.exp(tl.where(seen, cs_i[None, :] - cs_j[:, None], float("-inf")))  # [j, i]
        exit = tl.exp(tl.minimum(ft.load_row(scratch, last, head, DECAY) - cs_j, 0.0))
        if scan.seq_idx is not None:
            exit = tl.where(doc == left, exit, 0.0)
        sent, onward, dstep = (tl.zeros([K.Q], K.ACC),) * 3
        for p0 in range(0, K.P2, K.PS):
            p = p0 + tl.arange(0, K.PS)
            x_ = ft.load_tile(scan.x, tile, head, p, K.P)  # [Q, PS]
            G = ft.load_gated(scan, dy, chunk, head, p, K)  # [CHUNK, PS]
            T = ft.dot(x_, tl.trans(G), K) * L * step[:, None]  # gradient of C_i . B_j, [j, i]
            dCB += T
            sent += tl.sum(tl.where(later, T * CB, 0.0), 1)
            du = ft.dot(CB * L, G, K)
            dS = ft.load_state(dstates, slot, head, heads, p, n, K)  # [PS, N2]
            B_ = ft.load_tile(scan.B, tile, group, n, K.N)  # [Q, N2]
            edge = ft.dot(B_, tl.trans(dS), K) * exit[:, None]  # [Q, PS]
            dB_ = ft.dot(x_.to(K.ACC) * (step * exit)[:, None], dS, K, dB_)
            onward += tl.sum(x_.to(K.ACC) * edge, 1)
            du += edge
            dstep += tl.sum(x_.to(K.ACC) * du, 1)
            du *= step[:, None]
            if scan.D is not None:
                G_ = ft.load_gated(scan, dy, tile, head, p, K).to(K.ACC)
                du += G_ * ft.load_skip(scan.D, head, p, K)
                at_tile = slot * (K.CHUNK // K.Q) + (tile.t0 - chunk.t0) // K.Q
                at_channel = dD + (at_tile.to(tl.int64) * heads + head) * K.P + p
                tl.store(at_channel, tl.sum(G_ * x_.to(K.ACC), 0), mask=p < K.P)
            ft.store_tile(du, dx, tile, head, p, K.P)
        ft.store_row(sent, scratch, tile, head, SENT)
        ft.store_row(onward * step, scratch, tile, head, ONWARD)
        ft.store_row(dstep, scratch, tile, head, DSTEP)
    C_all = ft.load_tile(scan.C, chunk, group, n, K.N)  # [CHUNK, N2]
    ft.store_tile(ft.dot(dCB, C_all, K, dB_), dB, tile, share, n, K.N)

    if tile.t0 == chunk.t0:
        for r in range(count):
            head = first_head + r
            total = tl.sum(ft.load_row(scratch, last, head, DECAY), 0)
            flow = inner(states, dstates, slot, head, heads, K) * tl.exp(total)
            if scan.seq_idx is not None:
                flow = tl.where(entered == left, flow, 0.0)
            tl.store(through + slot.to(tl.int64) * heads + head, flow)


@triton.jit
def chunk_of(scan, slot, owner, length, K):
    """The chunk in a slot of the array of all."""
    seq = slot // tl.cdiv(length, K.CHUNK)
    if owner is not None:
        seq = tl.load(owner + slot).to(tl.int32)
    chunk = ft.sequence(scan, seq, length, tl.arange(0, K.CHUNK))
    before = slot - ft.slot_of(scan, seq, chunk.start, length, K.CHUNK)
    return ft.move(chunk, chunk.start + before * K.CHUNK, chunk.q)


@triton.jit(do_not_specialize=["length"])
def gradients_kernel(
    scan, dy, states, dstates, dx, dB, dC, dz, dD, through, scratch, owner, count, length, K
):
    """A program owns `count` heads of a group and a tile, as rows or as columns."""
    TILES: tl.constexpr = K.CHUNK // K.Q
    splits, groups = scan.per_group // count, scan.heads // scan.per_group
    pid = tl.program_id(0)
    outer = pid // (2 * TILES)
    share, slot = outer % (splits * groups), outer // (splits * groups)
    split, group = share // groups, share % groups
    first_head = group * scan.per_group + split * count
    chunk = chunk_of(scan, slot, owner, length, K)
    tile = ft.move(chunk, chunk.t0 + pid // 2 % TILES * K.Q, tl.arange(0, K.Q))
    if tile.t0 >= tile.end:
        return
    place = tile, chunk, slot, share, group, first_head, count
    if pid % 2 == 0:
        rows(scan, dy, states, dC, dz, scratch, *place, K)
    else:
        columns(scan, dy, states, dstates, dx, dB, dD, through, scratch, *place, K)


@triton.jit(do_not_specialize=["length"])
def steps_kernel(scan, ddt, through, sums, scratch, owner, length, K):
    """ddt, and a chunk's shares of dA and ddt_bias: the log decay of a token scales all that flows
    from before it to itself or later, summed so that no flow is counted and taken off again."""
    head, slot = tl.program_id(0) % scan.heads, tl.program_id(0) // scan.heads
    chunk = chunk_of(scan, slot, owner, length, K)
    if chunk.t0 >= chunk.end:
        return
    k = chunk.q
    step, slope = ft.step_sizes(scan, chunk, head, K)
    into = ft.load_row(scratch, chunk, head, INTO) - ft.load_row(scratch, chunk, head, SENT)
    onward = ft.load_row(scratch, chunk, head, ONWARD)
    at_sum = slot.to(tl.int64) * scan.heads + head
    flow = tl.where(k[:, None] >= k[None, :], into[:, None], onward[:, None])
    flow = tl.sum(flow, 0) + tl.load(through + at_sum)
    dstep = ft.load_row(scratch, chunk, head, DSTEP)
    dstep = (dstep + flow * tl.load(scan.A + head).to(K.ACC)) * slope
    ft.store_row(dstep, ddt, chunk, head)
    tl.store(sums + at_sum * 2, tl.sum(step * flow, 0))
    tl.store(sums + at_sum * 2 + 1, tl.sum(dstep, 0))


def splits_of_group(programs: int, per_group: int, multiprocessors: int) -> int:
    """Among how many programs the heads of a group are shared: no more than fill the GPU, since
    each writes its own dB and dC."""
    divisors = (d for d in range(1, per_group + 1) if per_group % d == 0)
    return next((d for d in divisors if programs * d >= 2 * multiprocessors), per_group)


def backward(dy, dfinal, *arguments) -> tuple[Tensor | None, ...]:
    """Gradients of the first nine fields of a Scan, None for what is absent; the arguments are
    those of `forward`."""
    given, options = ft.Scan(*arguments[:11]), arguments[11:]
    x, dt, A, B, C, D, z, initial_states, dt_bias, _, cu_seqlens = given[:11]
    batch, length, heads, P = x.shape
    groups, N = B.shape[2:]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    scan, K = ft.as_kernels_see(given, *options)
    family, multiprocessors = device(x.device)
    sweep_K, sweep_options = ft.launch("states", family, K)
    K, options = ft.launch("gradients", family, K)
    chunk, slices = K.CHUNK, K.P2 // sweep_K.PS
    exact = accumulator(*given[:9])
    factors = torch.bfloat16 if tl.bfloat16 == K.DOT else exact

    def empty(*shape: int, dtype: torch.dtype = exact) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    if cu_seqlens is None:
        slots, owner = batch * triton.cdiv(length, chunk), None
    else:
        slots = length // chunk + sequences
        index = torch.arange(slots, device=x.device)
        firsts = cu_seqlens[:-1] // chunk + index[:sequences]
        owner = torch.searchsorted(firsts, index, right=True) - 1
    count = segments(sequences, 2 * heads, slices, batch * length, multiprocessors)
    tiles = slots * (chunk // K.Q)
    splits = splits_of_group(2 * tiles * groups, scan.per_group, multiprocessors)

    ends = dends = whole = None
    if count > 1:
        ends, dends = (empty(sequences, count, heads, P, N) for _ in range(2))
        whole = empty(sequences, count, heads)
    states, dstates = (empty(slots, heads, P, N, dtype=factors) for _ in range(2))
    # of whole blocks of tokens: aligned, and whatever the length is the kernels stay the same
    scratch = ft.view(empty(batch, heads, 6, triton.cdiv(length, 16) * 16).permute(0, 3, 1, 2))
    through = empty(slots, heads)
    sums = torch.zeros(slots, heads, 2, dtype=exact, device=x.device)
    dD = None if D is None else torch.zeros(tiles, heads, P, dtype=exact, device=x.device)
    dx, ddt = empty(*x.shape, dtype=x.dtype), empty(*dt.shape, dtype=dt.dtype)
    dz = None if z is None else empty(*z.shape, dtype=z.dtype)
    dinitial = None if initial_states is None else torch.empty_like(initial_states)
    shares = (batch, length, splits * groups, N)
    dB, dC = (empty(*shares, dtype=t.dtype if splits == 1 else exact) for t in (B, C))
    dy, K = ft.view(dy), ft.static(K)
    sweep_K = ft.static(sweep_K._replace(CHUNK=chunk))  # it stores what the others read

    with torch.cuda.device_of(x):
        for stored in [True] if count == 1 else [False, True]:
            states_kernel[(2 * sequences * count * heads * slices,)](
                scan, dy, dfinal, dinitial, ends, dends, whole, states if stored else None,
                dstates if stored else None, scratch, sequences, length, sweep_K, SEGMENTS=count,
                **sweep_options,
            )  # fmt: skip
        gradients_kernel[(2 * tiles * groups * splits,)](
            scan, dy, states, dstates, *map(ft.view, (dx, dB, dC, dz)), dD, through, scratch, owner,
            scan.per_group // splits, length, K, **options,
        )  # fmt: skip
        steps_kernel[(slots * heads,)](
            scan, ft.view(ddt), through, sums, scratch, owner, length, K, **ROUND_ONCE
        )

    if splits > 1:
        dB, dC = (
            d.unflatten(2, (splits, groups)).sum(2).to(t.dtype) for d, t in ((dB, B), (dC, C))
        )
    dA = sums[:, :, 0].sum(0).to(A.dtype)
    ddt_bias = None if dt_bias is None else sums[:, :, 1].sum(0).to(dt_bias.dtype)
    dD = None if D is None else dD.sum(0 if D.ndim == 2 else (0, 2)).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dinitial, ddt_bias
