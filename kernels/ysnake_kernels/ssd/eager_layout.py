"""How the eager scan cuts its tensors: heads into groups, tokens into chunks, chunks into pieces.

Nothing is computed here. The methods return views where the strides allow it. docs/kernels.md
defines chunk and piece ("Words").

Comments give shapes in these letters: b batch times groups, r heads of a group, q tokens of a
chunk, k chunks of a piece, p head size, n state size. A state is stored transposed, with the
channels of all heads of a group as its rows: [b (r p) n].
"""

from itertools import pairwise

import torch
from torch import Tensor

from ysnake_kernels.numerics import ceil_divide
from ysnake_kernels.ssd.inputs import ScanInputs

CPU_CHUNK = 64  # tokens; 32 to 64 measured best on two cores, 128 and above lost
GPU_CHUNK = 128  # tokens
PIECE_ELEMENTS = 768 * 1024  # of x in a piece of several chunks: three megabytes in float32


class Layout:
    """The sizes of a scan, and the cuts that follow from them."""

    def __init__(self, inputs: ScanInputs):
        x, q = inputs.x, inputs.chunk_size
        self.batch, self.length, self.heads, self.p = x.shape
        self.groups, self.n = inputs.B.shape[2:]
        self.r = self.heads // self.groups
        self.b = self.batch * self.groups
        if q is None:
            q = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
        self.q = min(q, self.length)
        self.n_chunks = ceil_divide(self.length, self.q)
        self.last_q = self.length - (self.n_chunks - 1) * self.q  # tokens of the last chunk
        self.pieces = self._pieces(inputs.initial_states is not None)
        self.counts = [len(chunks) for chunks in self.pieces]

    def _pieces(self, from_a_state: bool) -> list[range]:
        """The numbers of each piece's chunks.

        If no state enters the first chunk, then the first and the last chunk are pieces by
        themselves: the first reads no state, and the state that leaves the last may not be wanted.
        A last chunk with fewer tokens is always a piece by itself.
        """
        most = max(1, PIECE_ELEMENTS // max(1, self.batch * self.q * self.heads * self.p))
        first = 0 if from_a_state else min(1, self.n_chunks - 1)
        last = self.n_chunks if from_a_state and self.last_q == self.q else self.n_chunks - 1
        count = ceil_divide(last - first, most)
        starts = (first + i * (last - first) // count for i in range(count))
        cuts = sorted({0, *starts, last, self.n_chunks})
        return [range(*ends) for ends in pairwise(cuts)]

    def tokens(self, chunks: range) -> slice:
        """The tokens of a piece's chunks."""
        return slice(chunks.start * self.q, min(chunks.stop * self.q, self.length))

    def has_successor(self, chunks: range) -> bool:
        """Whether another chunk reads a state that leaves one of a piece's chunks."""
        return len(chunks) > 1 or chunks.stop < self.n_chunks

    # Tensors with tokens

    def cut(self, t: Tensor, k: int) -> Tensor:
        """[batch (k q) (g r) ...] -> [k batch g q r ...], a view."""
        batch, length, heads, *more = t.shape
        t = t.view(batch, k, length // k, self.groups, heads // self.groups, *more)
        return t.permute(1, 0, 3, 2, *range(4, t.ndim))

    def fold(self, t: Tensor) -> Tensor:
        """[k batch g q r ...] -> [k b q r ...], a view where there is one group."""
        return t.flatten(1, 2)

    def unfold(self, t: Tensor) -> Tensor:
        """[k b q r ...] -> [k batch g q r ...], a view."""
        return t.unflatten(1, (self.batch, self.groups))

    def by_piece(self, t: Tensor) -> list[Tensor]:
        """[batch length (g r) ...] -> for each piece [k batch g q r ...], views."""
        if self.last_q == self.q:
            return list(self.cut(t, self.n_chunks).split(self.counts))
        full, last = t[:, : -self.last_q], t[:, -self.last_q :]
        return [*self.cut(full, self.n_chunks - 1).split(self.counts[:-1]), self.cut(last, 1)]

    def by_chunk(self, t: Tensor, repeat_last: bool = False) -> Tensor:
        """[batch length (g r)] -> [chunk b q r].

        The last chunk is filled up with zeros, or with the numbers of the last token.
        """
        if self.last_q < self.q:
            filler = t[:, -1:] if repeat_last else torch.zeros_like(t[:, -1:])
            t = torch.cat([t, filler.expand(-1, self.q - self.last_q, -1)], 1)
        return self.fold(self.cut(t, self.n_chunks))

    def split(self, t: Tensor, dim: int = 2) -> list[Tensor]:
        """[chunk b ... q ...] -> for each piece [k b ... q ...], views; q is dimension `dim`."""
        *parts, last = t.split(self.counts)
        return [*parts, last.narrow(dim, 0, self.last_q)]

    def by_token(self, t: Tensor) -> Tensor:
        """[chunk b q r] -> [batch length (g r)]."""
        t = self.unfold(t).permute(1, 0, 3, 2, 4)
        tokens = t.shape[1] * t.shape[2]
        return t.reshape(self.batch, tokens, self.heads)[:, : self.length]

    def merge_heads(self, t: Tensor) -> Tensor:
        """[k b q r p] -> [(k b) q (r p)], a view."""
        return t.view(-1, t.shape[2], self.r * self.p)

    # Tensors with heads, and states

    def by_group(self, t: Tensor) -> Tensor:
        """[(g r)] or [(g r) p] -> [b 1 r 1] or [b 1 r p]."""
        t = t.view(1, self.groups, 1, self.r, -1)
        return t.expand(self.batch, -1, -1, -1, -1).flatten(0, 1)

    def fold_state(self, state: Tensor) -> Tensor:
        """[batch (g r) p n] -> [b (r p) n], contiguous."""
        return state.reshape(self.b, self.r * self.p, self.n).contiguous()

    def by_head(self, states: Tensor) -> Tensor:
        """[... (r p) n] -> [... r (p n)], a view."""
        return states.view(*states.shape[:-2], self.r, self.p * self.n)
