"""The SSD scan in pure torch, forward: chunk by chunk, with the state carried from one to the next.

It computes a piece at a time: as many chunks as stay in the cache. The work inside the chunks is
done for all chunks of a piece at once. Only the state goes from chunk to chunk. The heads of a
group share B and C, so a product with the state is one matrix product for all of them. The caller
gets each piece's outputs while they are in the cache. So the gate, or the norm of the mixer, needs
no pass of its own.

`eager_layout` has the cuts and `eager_chunks` the arithmetic. docs/kernels.md explains the symbols
("In pure torch"). Source: arXiv 2405.21060, section 6.
"""

from collections.abc import Callable

from torch import Tensor

from ysnake_kernels.numerics import log_decays, step_sizes
from ysnake_kernels.ssd.eager_chunks import (
    EdgeStates,
    PreparedScan,
    advance,
    decay_matrix,
    outputs,
    read_states,
    scores,
    select,
    weights,
)
from ysnake_kernels.ssd.inputs import ScanInputs


def forward(
    inputs: ScanInputs,
    finish: Callable[[slice, Tensor], None],
    want_states: bool = True,
    out: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute y before the gate, piece by piece, and the final states.

    Args:
        inputs: as `ssd_scan` has checked them; z is not used.
        finish: called as `finish(tokens, y)` with the y of each piece (batch, tokens, heads, P).
        want_states: whether to compute the final states.
        out: (batch, length, heads, P), where y is written. If None, the next piece overwrites y.
        keep: whether to return tensors for `backward`.

    Returns:
        The final states (batch, heads, P, N), which may share memory with the rest, or None; and
        for `backward` the states at the edges of all chunks, followed by each piece's C S. That
        list is empty if there is one chunk, or if the states take more than twice the memory of x.
    """
    dt = step_sizes(
        inputs.dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit, inputs.accumulator
    )
    scan = PreparedScan(inputs, dt, log_decays(dt, inputs.A))
    layout, edges = scan.layout, EdgeStates(scan)
    S = scan.fold_state(inputs.initial_states)
    kept: list[Tensor | None] = []
    states = None
    if keep and layout.n_chunks > 1 and layout.n <= 2 * layout.q:
        states = scan.empty_states()
        kept.append(states)
        if S is not None:
            states[0] = S
    for number, chunks in enumerate(layout.pieces):
        piece = scan.piece(number)
        L = decay_matrix(scan, piece)
        W = weights(scan, L, scores(piece), out=L)
        if states is None:
            entering, leaving = edges.after(S, chunks)
        else:
            entering, leaving = select(states, chunks, inputs.initial_states is not None)
        if want_states or layout.has_successor(chunks):
            advance(scan, piece, entering, leaving)
        CS = read_states(piece, entering)
        if states is not None:
            kept.append(CS)
        part = None if out is None else out[:, piece.tokens]
        finish(piece.tokens, outputs(scan, piece, W, CS, part))
        S = leaving[-1]
    if S is None or not want_states:
        return None, kept
    return S.view(layout.batch, layout.heads, layout.p, layout.n), kept
