"""The kernels of the fused backward: rows, columns and steps.

With G = dy silu(z), u = step x, S the entering state, dS the leaving state's gradient and

    y_i = entry_i C_i S + sum_(j<=i) (C_i . B_j) L_ij u_j        S' = whole S + sum_j exit_j B_j u_j

the flow from token j to token i, the gradient of cs_i - cs_j, is M_ij = (C_i . B_j) L_ij G_i . u_j.

`rows_kernel` computes L from DECAY and SOURCE, so its L includes the step of token j, and it needs
no u. In `columns_kernel` L is the decay alone.
"""

import triton
import triton.language as tl

from ysnake_kernels.ssd import fused_tiles as ft
from ysnake_kernels.ssd.fused_tiles import DECAY, DSTEP, INTO, ONWARD, SENT, STEP


@triton.jit
def inner(states, dstates, slot, head, K):
    """<S, dS>, read in narrow strips, since wide sums occupy most registers meanwhile."""
    total = tl.zeros([], K.ACC)
    for p0 in range(0, K.P2, K.PS):
        p = p0 + tl.arange(0, K.PS)
        for n0 in range(0, K.N2, 16):
            n = n0 + tl.arange(0, 16)
            S = ft.load_state(states, slot, head, p, n, K).to(K.ACC)
            dS = ft.load_state(dstates, slot, head, p, n, K).to(K.ACC)
            total += tl.sum(tl.sum(S * dS, 1), 0)
    return total


@triton.jit
def work_of(place, splits, count, K):
    """Returns (chunk, slot, tile, share, group, first_head) of this program.

    A program of `rows_kernel` or `columns_kernel` takes one tile of one chunk, and one share of the
    heads. The heads of a group are divided into `splits` shares of `count` heads.
    """
    TILES: tl.constexpr = K.CHUNK // K.Q
    GROUPS: tl.constexpr = K.HEADS // K.PER_GROUP
    outer = tl.program_id(0) // TILES
    share, slot = outer % (splits * GROUPS), outer // (splits * GROUPS)
    split, group = share // GROUPS, share % GROUPS
    first_head = group * K.PER_GROUP + split * count
    chunk = ft.chunk_in(place, slot, K.CHUNK)
    t0 = chunk.t0 + tl.program_id(0) % TILES * K.Q
    return chunk, slot, ft.move(chunk, t0, tl.arange(0, K.Q)), share, group, first_head


@triton.jit
def within(dB_within, number, splits, tokens, K):
    """What tile `number` of every chunk adds to dB, out of dB_within [tiles, tokens, shares, N]."""
    token = splits * (K.HEADS // K.PER_GROUP) * K.N
    return ft.View(dB_within + tl.cast(number, tl.int64) * tokens * token, token)


@triton.jit
def add_within(
    dB, dB_within, chunk, tile, share, splits, tokens, K, ROW_TILE: tl.constexpr
):  # fmt: skip
    """dB of a tile with what the row tiles of its chunk add. `rows_kernel` wrote it."""
    n = tl.arange(0, K.N2)
    for t0 in range(0, tl.minimum(K.CHUNK, chunk.end - chunk.t0), ROW_TILE):
        part = within(dB_within, t0 // ROW_TILE, splits, tokens, K)
        dB += ft.load_tile(part, tile, share, n, K.N)
    return dB


@triton.jit(
    do_not_specialize=[
        *("x_token", "B_token", "C_token", "G_token", "dC_token"),
        *("length", "padded", "sequences", "splits", "count", "tokens"),
    ]
)
def rows_kernel(
    x, B, C, D, G, rows, seq_idx, cu_seqlens, states, dC, dB_within, y,
    x_token, B_token, C_token, G_token, dC_token, length, padded, sequences, splits, count, tokens,
    K,
):  # fmt: skip
    """Write dC of a tile, the flow into its tokens (INTO) from the chunk's entering state and the
    tokens before, and what the tile adds to its chunk's dB. Write y, before the gate, if given.

    `rows` has numbers of each head and token: DECAY and SOURCE are read, INTO is written.
    """
    xs, Bs = ft.View(x, x_token * K.UNIT), ft.View(B, B_token * K.UNIT)
    Cs, Gs = ft.View(C, C_token * K.UNIT), ft.View(G, G_token * K.UNIT)
    numbers = ft.Rows(rows, padded, ft.BACKWARD_ROWS)
    place = ft.Place(seq_idx, cu_seqlens, sequences, length)
    chunk, slot, tile, share, group, first_head = work_of(place, splits, count, K)
    if tile.t0 >= tile.end:
        return
    n = tl.arange(0, K.N2)
    ti, tj = tile.t0 + tile.q, chunk.t0 + chunk.q
    later = ti[:, None] > tj[None, :]
    seen = ti[:, None] >= tj[None, :]
    if place.seq_idx is not None:
        doc = ft.document(place, tile, ti)
        seen &= doc[:, None] == ft.document(place, tile, tj)[None, :]
        entered = doc == ft.document(place, tile, tl.maximum(chunk.t0 - 1, tile.start))
    # B and C are loaded here for CB only. The loop loads C again for each head, and B is loaded
    # again after it, from the cache. Kept during the loop, they would need too many registers.
    C_i, B_j = ft.load_tile(Cs, tile, group, n, K.N), ft.load_tile(Bs, chunk, group, n, K.N)
    CB = ft.dot(C_i, tl.trans(B_j), K)  # [i, j]
    dCB = tl.zeros([K.Q, K.CHUNK], K.ACC)
    dC_ = tl.zeros([K.Q, K.N2], K.ACC)
    for r in range(count):
        head = first_head + r
        decay, _ = ft.load_decays(numbers, tile, head, K)
        _, source = ft.load_decays(numbers, chunk, head, K)
        L = tl.exp2(tl.where(seen, decay[:, None] - source[None, :], float("-inf")))
        entry = tl.exp2(decay)
        if place.seq_idx is not None:
            entry = tl.where(entered, entry, 0.0)
        into = tl.zeros([K.Q], K.ACC)
        for p0 in range(0, K.P2, K.PS):
            p = p0 + tl.arange(0, K.PS)
            S = ft.load_state(states, slot, head, p, n, K)  # [PS, N2]
            X = ft.load_tile(xs, chunk, head, p, K.P)  # [CHUNK, PS]
            C_ = ft.load_tile(Cs, tile, group, n, K.N)  # [Q, N2]
            read = ft.dot(C_, tl.trans(S), K) * entry[:, None]  # [Q, PS]
            Gt = ft.load_tile(Gs, tile, head, p, K.P)  # [Q, PS]
            into += tl.sum(read * Gt.to(K.ACC), 1)
            dC_ = ft.dot(Gt.to(K.ACC) * entry[:, None], S, K, dC_)
            T = ft.dot(Gt, tl.trans(X), K) * L  # gradient of C_i . B_j, [i, j]
            dCB += T
            into += tl.sum(tl.where(later, T * CB, 0.0), 1)
            if y is not None:
                read = ft.dot(CB * L, X, K, read)
                if D is not None:
                    skipped = ft.load_tile(xs, tile, head, p, K.P).to(K.ACC)
                    read += skipped * ft.load_skip(D, head, p, K)
                ft.store_tile(read, ft.View(y, K.HEADS * K.P), tile, head, p, K.P)
        ft.store_row(into, numbers, tile, head, K, INTO)
    B_all = ft.load_tile(Bs, chunk, group, n, K.N)  # [CHUNK, N2]
    dCs = ft.View(dC, dC_token * K.UNIT)
    ft.store_tile(ft.dot(dCB, B_all, K, dC_), dCs, tile, share, n, K.N)
    C_ = ft.load_tile(Cs, tile, group, n, K.N)
    part = within(dB_within, (tile.t0 - chunk.t0) // K.Q, splits, tokens, K)
    ft.store_tile(ft.dot(tl.trans(dCB), C_, K), part, chunk, share, n, K.N)


@triton.jit
def store_no_dD(dD, at_tile, first_head, count, K):
    """Write zeros as dD of a tile without tokens, for `count` heads."""
    for r in range(count):
        if K.D_PER_CHANNEL:
            p = tl.arange(0, K.P2)
            at_channel = dD + (at_tile + first_head + r) * K.P + p
            tl.store(at_channel, tl.zeros([K.P2], K.ACC), mask=p < K.P)
        else:
            tl.store(dD + at_tile + first_head + r, 0.0)


@triton.jit
def add_skip(dX, X, D, Gs, dD, at_tile, tile, head, p, K):
    """dX with what D of each channel adds. Writes dD of the tile."""
    Gt = ft.load_tile(Gs, tile, head, p, K.P).to(K.ACC)
    dX += Gt * ft.load_skip(D, head, p, K)
    at_channel = dD + (at_tile + head) * K.P + p
    tl.store(at_channel, tl.sum(Gt * X.to(K.ACC), 0), mask=p < K.P)
    return dX


@triton.jit
def flow_through(states, dstates, slot, numbers, last, head, K):
    """The flow from a chunk's entering to its leaving state, if no document ends between them."""
    total = ft.load_decay_of_last(numbers, last, head, K)
    return inner(states, dstates, slot, head, K) * tl.exp2(total)


@triton.jit(
    do_not_specialize=[
        *("x_token", "B_token", "C_token", "G_token", "dx_token", "dB_token"),
        *("length", "padded", "sequences", "splits", "count", "tokens"),
    ]
)
def columns_kernel(
    x, B, C, D, G, rows, seq_idx, cu_seqlens, states, dstates, dB_within, dx, dB, dD, through,
    x_token, B_token, C_token, G_token, dx_token, dB_token, length, padded, sequences, splits,
    count, tokens, K, ROW_TILE: tl.constexpr,
):  # fmt: skip
    """Write dx, dB and dD of a tile, and the flow out of its tokens (SENT, ONWARD). The program of
    a chunk's first tile also writes the flow from the chunk's entering to its leaving state."""
    xs, Bs = ft.View(x, x_token * K.UNIT), ft.View(B, B_token * K.UNIT)
    Cs, Gs = ft.View(C, C_token * K.UNIT), ft.View(G, G_token * K.UNIT)
    numbers = ft.Rows(rows, padded, ft.BACKWARD_ROWS)
    place = ft.Place(seq_idx, cu_seqlens, sequences, length)
    chunk, slot, tile, share, group, first_head = work_of(place, splits, count, K)
    at_tile = slot * (K.CHUNK // K.Q) + (tile.t0 - chunk.t0) // K.Q
    at_tile = at_tile.to(tl.int64) * K.HEADS
    if tile.t0 >= tile.end:
        if D is not None:
            store_no_dD(dD, at_tile, first_head, count, K)
        return
    n = tl.arange(0, K.N2)
    tj, ti = tile.t0 + tile.q, chunk.t0 + chunk.q
    last = ft.last_of(chunk, K.CHUNK)
    later = tj[:, None] < ti[None, :]
    seen = tj[:, None] <= ti[None, :]
    if place.seq_idx is not None:
        doc = ft.document(place, tile, tj)
        seen &= doc[:, None] == ft.document(place, tile, ti)[None, :]
        left = tl.sum(ft.document(place, last, last.t0 + last.q), 0)
        entered = ft.document(place, tile, tl.maximum(chunk.t0 - 1, tile.start))
    B_j, C_i = ft.load_tile(Bs, tile, group, n, K.N), ft.load_tile(Cs, chunk, group, n, K.N)
    CB = ft.dot(B_j, tl.trans(C_i), K)  # [j, i]
    itself = tl.sum(tl.where(tj[:, None] == ti[None, :], CB, 0.0), 1)  # B_j . C_j
    dB_ = tl.zeros([K.Q, K.N2], K.ACC)
    for r in range(count):
        head = first_head + r
        decay_j = ft.load_row(numbers, tile, head, K, DECAY)
        decay_i, _ = ft.load_decays(numbers, chunk, head, K)
        step = ft.load_row(numbers, tile, head, K, STEP)
        exit = tl.exp2(ft.load_decay_of_last(numbers, last, head, K) - decay_j)
        if place.seq_idx is not None:
            exit = tl.where(doc == left, exit, 0.0)
        sent, onward, own = (tl.zeros([K.Q], K.ACC),) * 3
        for p0 in range(0, K.P2, K.PS):
            # In an order that lets few large tiles live at once: registers are short here.
            p = p0 + tl.arange(0, K.PS)
            X = ft.load_tile(xs, tile, head, p, K.P)  # [Q, PS]
            Gc = ft.load_tile(Gs, chunk, head, p, K.P)  # [CHUNK, PS]
            XG = ft.dot(X, tl.trans(Gc), K)  # [j, i]
            diagonal = tj[:, None] == ti[None, :]
            own += tl.sum(tl.where(diagonal, XG, 0.0), 1)
            L = tl.exp2(tl.where(seen, decay_i[None, :] - decay_j[:, None], float("-inf")))
            sent += tl.sum(tl.where(later, XG * L * CB, 0.0), 1)
            between = CB * L * step[:, None]  # [j, i], from x_j to y_i
            if D is not None and not K.D_PER_CHANNEL:
                between += tl.where(diagonal, tl.load(D + head).to(K.ACC), 0.0)
            dX = ft.dot(between, Gc, K)
            dS = ft.load_state(dstates, slot, head, p, n, K)  # [PS, N2]
            B_ = ft.load_tile(Bs, tile, group, n, K.N)  # [Q, N2]
            du = ft.dot(B_, tl.trans(dS), K) * exit[:, None]  # [Q, PS]
            onward += tl.sum(X.to(K.ACC) * du, 1)
            dX += du * step[:, None]
            if D is not None and K.D_PER_CHANNEL:
                dX = add_skip(dX, X, D, Gs, dD, at_tile, tile, head, p, K)
            ft.store_tile(dX, ft.View(dx, dx_token * K.UNIT), tile, head, p, K.P)
            dB_ = ft.dot(X.to(K.ACC) * (step * exit)[:, None], dS, K, dB_)
        ft.store_row(sent * step, numbers, tile, head, K, SENT)
        ft.store_row(onward * step, numbers, tile, head, K, ONWARD)
        ft.store_row(sent + own * itself + onward, numbers, tile, head, K, DSTEP)
        if D is not None and not K.D_PER_CHANNEL:
            tl.store(dD + at_tile + head, tl.sum(own, 0))
    dB_ = add_within(dB_, dB_within, chunk, tile, share, splits, tokens, K, ROW_TILE)
    ft.store_tile(dB_, ft.View(dB, dB_token * K.UNIT), tile, share, n, K.N)

    if tile.t0 == chunk.t0:
        for r in range(count):
            head = first_head + r
            flow = flow_through(states, dstates, slot, numbers, last, head, K)
            if place.seq_idx is not None:
                flow = tl.where(entered == left, flow, 0.0)
            tl.store(through + slot.to(tl.int64) * K.HEADS + head, flow)


@triton.jit(do_not_specialize=["dt_token", "ddt_token", "length", "padded", "sequences"])
def steps_kernel(
    dt, A, dt_bias, rows, cu_seqlens, ddt, through, dA, ddt_bias,
    dt_token, ddt_token, length, padded, sequences, K, HEADS: tl.constexpr,
):  # fmt: skip
    """Write ddt, and a chunk's shares of dA and ddt_bias. A program owns a chunk and HEADS heads.

    The gradient of a token's log decay is the sum of all flows from earlier tokens to this token or
    later ones. In this order no flow is added and later subtracted, which would lose digits.
    """
    place, numbers = (
        ft.Place(None, cu_seqlens, sequences, length),
        ft.Rows(rows, padded, ft.BACKWARD_ROWS),
    )
    blocks = tl.cdiv(K.HEADS, HEADS)
    slot = tl.program_id(0) // blocks
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    known = head < K.HEADS
    at_sum = slot.to(tl.int64) * K.HEADS + head
    chunk = ft.chunk_in(place, slot, K.CHUNK)
    if chunk.t0 >= chunk.end:
        tl.store(dA + at_sum, tl.zeros([HEADS], K.ACC), mask=known)
        tl.store(ddt_bias + at_sum, tl.zeros([HEADS], K.ACC), mask=known)
        return
    raw, bias, used = ft.load_dt(dt, dt_bias, dt_token, chunk, head, K)  # [Q, H]
    step, slope = ft.step_sizes(raw, bias, used, K)
    at = ft.first_row_at(numbers, chunk, head, K.HEADS)  # [Q, H]
    into = tl.load(at + INTO * padded, mask=used, other=0.0)
    into -= tl.load(at + SENT * padded, mask=used, other=0.0)
    earlier = used & (chunk.q > 0)[:, None]
    onward = tl.load(at + ONWARD * padded - 1, mask=earlier, other=0.0)
    flow = tl.cumsum(into, 0, reverse=True) + tl.cumsum(onward, 0)
    flow += tl.load(through + at_sum, mask=known, other=0.0)[None, :]
    dstep = tl.load(at + DSTEP * padded, mask=used, other=0.0)
    decay, rates = ft.log_decays(step, A, head, K)
    flow = tl.where(decay < tl.full([], ft.LOWEST, K.ACC), 0.0, flow)
    dstep = (dstep + flow * rates) * slope
    first = (chunk.earlier + chunk.t0).to(tl.int64) * ddt_token
    at_dt = ddt + first + chunk.q[:, None] * ddt_token + head[None, :]
    tl.store(at_dt, dstep.to(ddt.dtype.element_ty), mask=used)
    tl.store(dA + at_sum, tl.sum(step * flow, 0), mask=known)
    tl.store(ddt_bias + at_sum, tl.sum(dstep, 0), mask=known)
