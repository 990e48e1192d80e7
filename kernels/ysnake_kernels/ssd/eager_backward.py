"""The gradient of the SSD scan in pure torch: the chunks from the last to the first.

For each piece the backward pass first takes the gradients inside its chunks, then those that pass
the edges of the chunks with the state. What the gradients of dt and A need is collected for each
token and head (`Flows`), and summed at the end for all chunks at once. docs/kernels.md derives the
formulas ("Backward") and explains the symbols ("In pure torch").
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.numerics import (
    SMALLEST_LOG_DECAY,
    finite_rates,
    log_decays,
    step_sizes,
    step_sizes_backward,
)
from ysnake_kernels.ssd.eager_chunks import (
    EdgeStates,
    Piece,
    PreparedScan,
    add_decayed,
    advance,
    decay_matrix,
    mask,
    multiply,
    multiply_heads,
    outputs,
    read_states,
    scores,
    select,
    sum_products,
    weighted_x,
    weights,
    write,
)
from ysnake_kernels.ssd.eager_layout import Layout
from ysnake_kernels.ssd.inputs import ScanInputs, SequenceGradients

SMALLEST_STEP = 1e-18  # a factor dt is at least this: the gradient of log dt is divided by dt


class ParameterGradients(NamedTuple):
    """The gradients that are sums over all tokens, and that of the initial states."""

    dA: Tensor
    dD: Tensor | None
    dinitial: Tensor | None
    dbias: Tensor | None


class Flows(NamedTuple):
    """For each token and head, what the gradients of dt A and of log dt are summed from.

    Of all chunks [chunk b ...], or of one piece [k b ...].
    """

    within: Tensor  # [k b r q] sum_(j<t) M_tj - sum_(i>t) M_it
    log_dt: Tensor  # [k b r q] sum_(i>=t) M_it
    entry: Tensor  # [k b q r] the gradient of entry; times entry it is p_i of docs/kernels.md
    exit: Tensor  # [k b q r] the gradient of exit; times exit it is q_j of docs/kernels.md
    whole: Tensor  # [k b r] <dS', S>

    @staticmethod
    def zeros(scan: PreparedScan) -> "Flows":
        chunks, b, q, r = scan.entry.shape
        within, log_dt = scan.entry.new_zeros(2, chunks, b, r, q)
        return Flows(
            within, log_dt, *(torch.zeros_like(t) for t in (scan.entry, scan.exit, scan.whole))
        )

    def by_piece(self, layout: Layout) -> list["Flows"]:
        """The flows of each piece, views."""
        inside = (layout.split(t, 3) for t in (self.within, self.log_dt))
        edges = (layout.split(t) for t in (self.entry, self.exit))
        return [
            Flows(*t) for t in zip(*inside, *edges, self.whole.split(layout.counts), strict=True)
        ]

    def gradients(self, scan: PreparedScan) -> tuple[Tensor, Tensor]:
        """Those of the log decays dt A and of log dt, [batch length heads]."""
        q = self.exit * scan.exit
        arriving = self.within.transpose(2, 3).addcmul(self.entry, scan.entry)
        dl = arriving.flip(2).cumsum(2).flip(2)  # the sum over i >= t
        dl = dl.add_(q.cumsum(2).sub_(q)).add_((scan.whole * self.whole)[:, :, None])
        dlog_dt = self.log_dt.transpose(2, 3) + q
        return scan.layout.by_token(dl), scan.layout.by_token(dlog_dt)


class Matrices(NamedTuple):
    """The matrices inside a piece's chunks, [k b r i j], with L and CB such that W = CB L + D."""

    L: Tensor
    CB: Tensor
    W: Tensor


class AtEdges(NamedTuple):
    """The states at the edges of a piece's chunks, [k b (r p) n]. None means zeros."""

    S: Tensor | None  # those that enter
    CS: Tensor | None  # what the tokens read of them, C S [k b q r p]
    dentering: Tensor  # memory for the gradient of those that enter
    # The gradient of those that leave. A chunk's leaving state is the next one's entering state, so
    # all but the last share memory with dentering.
    dleaving: Tensor | None


class PieceGradients(NamedTuple):
    """The gradients of a piece's tensors."""

    x: Tensor  # [k b q r p]
    B: Tensor  # [(k b) q n]
    C: Tensor  # [(k b) q n]


def backward(
    inputs: ScanInputs,
    gradient: Callable[[slice, Callable[[], Tensor]], Tensor],
    dstates: Tensor | None,
    into: SequenceGradients,
    kept: Sequence[Tensor | None] = (),
) -> ParameterGradients:
    """Write the gradients of x, dt, B and C, and return the others.

    Args:
        inputs: those of `forward`.
        gradient: called as `gradient(tokens, y)` for each piece, from the last to the first. It
            returns the gradient of y before the gate (batch, tokens, heads, P). y() computes that
            y, in memory that the next piece overwrites.
        dstates: the gradient of the final states (batch, heads, P, N); None means zeros.
        into: memory for the gradients of x, dt, B and C.
        kept: what `forward` returned for this; empty: the states are computed again.
    """
    exact = step_sizes(
        inputs.dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit, inputs.accumulator
    )
    dt = exact.clamp(min=SMALLEST_STEP)
    scan = PreparedScan(inputs, dt, log_decays(exact, inputs.A))
    layout, edges = scan.layout, EdgeStates(scan)
    states, *reads = kept or [compute_states(scan, inputs.initial_states)]
    assert states is not None
    dS = scan.fold_state(dstates)
    D = inputs.D
    dD = None if D is None else dt.new_zeros(layout.b, layout.r, *D.shape[1:])
    flows = Flows.zeros(scan)
    flows_of = flows.by_piece(layout)
    dx, dB, dC = (layout.by_piece(t) for t in (into.dx, into.dB, into.dC))
    for number, chunks in reversed(list(enumerate(layout.pieces))):
        piece = scan.piece(number)
        S, _ = select(states, chunks, inputs.initial_states is not None)
        L, CB = decay_matrix(scan, piece), scores(piece)
        W = weights(scan, L, CB, out=scan.buffers.W.shaped(*L.shape))
        CS = reads[number] if reads else read_states(piece, S)
        G = gradient(piece.tokens, partial(outputs, scan, piece, W, CS))
        G = layout.fold(layout.cut(G, len(chunks)).to(scan.dtype))  # [k b q r p]

        gradients = gradients_inside_chunks(
            scan, piece, Matrices(L, CB, W), G, flows_of[number], dD
        )
        at_edges = AtEdges(S, CS, *edges.before(dS, chunks))
        dV = add_gradients_across_edges(scan, piece, at_edges, G, flows_of[number], gradients)
        write(layout, dx[number], gradients.x, dV, piece.exit)
        for into_piece, found in ((dB[number], gradients.B), (dC[number], gradients.C)):
            write(layout, into_piece, found.unflatten(0, (len(chunks), layout.b)).unsqueeze(3))
        if S is not None:
            dS = at_edges.dentering[0]

    dA, ddt = step_gradients(inputs, scan, dt, flows)
    into.ddt.copy_(ddt)
    dbias = None if inputs.dt_bias is None else ddt.sum((0, 1)).to(inputs.dt_bias.dtype)
    if D is not None and dD is not None:
        dD = dD.view(layout.batch, *D.shape).sum(0).to(D.dtype)
    dinitial = None
    if inputs.initial_states is not None and dS is not None:
        dinitial = dS.reshape(inputs.initial_states.shape).to(inputs.initial_states.dtype)
    return ParameterGradients(dA, dD, dinitial, dbias)


def compute_states(scan: PreparedScan, initial_states: Tensor | None) -> Tensor:
    """The states at the edges of all chunks. The last is computed only if a chunk follows it."""
    states, S = scan.empty_states(), scan.fold_state(initial_states)
    if S is not None:
        states[0] = S
    for number, chunks in enumerate(scan.layout.pieces):
        if scan.layout.has_successor(chunks):
            advance(scan, scan.piece(number), *select(states, chunks, S is not None))
    return states


def gradients_inside_chunks(
    scan: PreparedScan,
    piece: Piece,
    matrices: Matrices,
    G: Tensor,
    flows: Flows,
    dD: Tensor | None,
) -> PieceGradients:
    """The gradients that y_i = sum_j W_ij x_j gives. Writes flows.within and flows.log_dt, adds to
    dD."""
    (L, CB, W), buffers = matrices, scan.buffers
    G_heads = G.transpose(2, 3)  # [k b r q p]
    dW = multiply_heads(buffers.dW, G_heads, piece.x.permute(0, 1, 3, 4, 2))  # G_i . x_j
    dx = multiply_heads(buffers.within, W.transpose(3, 4), G_heads).transpose(2, 3)
    if dD is not None and scan.D_of_heads is not None:
        dD += dW.diagonal(dim1=3, dim2=4).sum((0, 3)).view_as(dD)
    if dD is not None and scan.D_of_channels is not None:
        dD += multiply(scan, piece.x, G).sum((0, 2))
        dx.addcmul_(G, scan.D_of_channels)
    dCB = mask(piece, dW.mul_(L).sum(2)).flatten(0, 1)  # [(k b) i j]
    dC, dB = torch.bmm(dCB, piece.B), torch.bmm(dCB.transpose(1, 2), piece.C)
    M = dW.mul_(CB)  # the gradient of cs_i - cs_j + log dt_j
    diagonal = M.diagonal(dim1=3, dim2=4)
    flows.log_dt.copy_(diagonal)
    diagonal.zero_()
    leaving = M.sum(3)  # sum_(i>j) M_ij
    flows.log_dt.add_(leaving)
    torch.sub(M.sum(4), leaving, out=flows.within)
    return PieceGradients(dx, dB, dC)


def add_gradients_across_edges(
    scan: PreparedScan,
    piece: Piece,
    states: AtEdges,
    G: Tensor,
    flows: Flows,
    gradients: PieceGradients,
) -> Tensor | None:
    """The gradients that y_i += entry_i C_i S and S' = whole S + sum_j V_j B_j give.

    Writes the gradients of the entering states, and flows.entry, flows.exit and flows.whole. Adds
    to `gradients.B` and `gradients.C`. Returns dV [k b q r p], None if it is zero.
    """
    S, CS, dentering, dleaving = states
    layout = scan.layout
    if S is not None and CS is not None:
        sum_products(scan, CS, G, flows.entry)
        dCS = scan.buffers.dCS.shaped(*G.shape)
        dCS = layout.merge_heads(torch.mul(G, piece.entry[..., None], out=dCS))
        gradients.C.baddbmm_(dCS, S.flatten(0, 1))
        torch.bmm(dCS.transpose(1, 2), piece.C, out=dentering.flatten(0, 1))
        if dleaving is not None:
            add_decayed(layout, dleaving[-1], piece.whole[-1], dentering[-1])
        for c in reversed(range(len(dentering) - 1)):
            add_decayed(layout, dentering[c + 1], piece.whole[c], dentering[c])
    if dleaving is None:
        return None
    rows = dleaving.flatten(0, 1)  # [(k b) (r p) n]
    dV = torch.bmm(piece.B, rows.transpose(1, 2)).view(piece.x.shape)
    sum_products(scan, dV, piece.x, flows.exit)
    gradients.B.baddbmm_(weighted_x(scan, piece), rows)
    if S is not None:
        sum_products(scan, layout.by_head(dleaving), layout.by_head(S), flows.whole)
    return dV


def step_gradients(
    inputs: ScanInputs, scan: PreparedScan, dt: Tensor, flows: Flows
) -> tuple[Tensor, Tensor]:
    """dA, and the gradient of dt before bias, softplus and limits, in dt's dtype."""
    dl, dlog_dt = flows.gradients(scan)
    rates = finite_rates(inputs.A.to(scan.dtype))
    dl.masked_fill_(dt * rates < SMALLEST_LOG_DECAY, 0)  # these were cut: dt and A do not matter
    dA = (dl * dt).sum((0, 1)).to(inputs.A.dtype)
    ddt = dlog_dt.div_(dt).addcmul_(dl, rates)
    options = inputs.dt_softplus, inputs.dt_limit
    return dA, step_sizes_backward(ddt, inputs.dt, inputs.dt_bias, *options)


def gate_backward(y: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y and z from that of y silu(z), and y silu(z) itself; all in y's dtype."""
    z, grad = z.to(y.dtype), grad.to(y.dtype)
    gate = F.silu(z)
    return grad * gate, torch.ops.aten.silu_backward(grad * y, z), y * gate
