"""Mamba-1's selective scan in pure torch, block by block.

A block has some tokens of some rows and channels, so few that it fits in the cache. Its decays and
inputs are computed for all its tokens at once. Then one operation for each token updates the state.
Forward keeps the state before each block, and backward computes the rest of the block again.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable
from ysnake_kernels.numerics import SMALLEST_LOG_DECAY, finite_rates

TILE_ELEMENTS = 256 * 1024  # a megabyte in float32
FEWEST_TOKENS = 16  # of a block, so that the kept states take little memory


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the last state of `selective_scan`.

    dt are the step sizes after bias and softplus. B and C are (batch, groups, N, length).
    """
    acc = dt.dtype
    us, dt = u.transpose(1, 2).to(acc), dt.transpose(1, 2).contiguous()  # [b l d]
    tensors = (us, dt, finite_rates(A.to(acc)), B.to(acc), C.to(acc))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, last, _ = _differentiable(*tensors, keep)
    if D is not None:
        y = y + us * D.to(acc)
    y = y.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(u.dtype), last.transpose(1, 2).contiguous()


class _Tiles:
    """How a scan is cut: into slices of rows and channels, and each of these into blocks."""

    def __init__(self, dt: Tensor, B: Tensor):
        self.rows, self.length, self.channels = dt.shape
        self.groups, self.n = B.shape[1:3]
        per_group = self.channels // self.groups
        most = max(1, TILE_ELEMENTS // (FEWEST_TOKENS * self.n))  # channels of all rows
        parts = -(-per_group // most)
        self.width = -(-per_group // parts)
        self.height = max(1, min(self.rows, most // self.width))
        fitting = TILE_ELEMENTS // (self.height * self.width * self.n)
        self.block = min(self.length, max(FEWEST_TOKENS, fitting))
        self.blocks = -(-self.length // self.block)

    def slices(self) -> Iterator[tuple[slice, slice, int]]:
        """Rows, channels, and the group that these channels belong to."""
        per_group = self.channels // self.groups
        for group in range(self.groups):
            end = (group + 1) * per_group
            for first in range(group * per_group, end, self.width):
                channels = slice(first, min(first + self.width, end))
                for row in range(0, self.rows, self.height):
                    yield slice(row, min(row + self.height, self.rows)), channels, group

    def spans(self) -> list[slice]:
        """The tokens of each block."""
        starts = range(0, self.length, self.block)
        return [slice(start, min(start + self.block, self.length)) for start in starts]


class _Slice:
    """The inputs of some rows and channels: u and dt [b l d], A [n d], B and C [b l n]."""

    def __init__(self, tensors: tuple[Tensor, ...], rows: slice, channels: slice, group: int):
        u, dt, A, B, C = tensors
        self.u, self.dt = u[rows, :, channels], dt[rows, :, channels]
        self.A = A[channels].t().contiguous()
        self.B, self.C = (t[rows, group].transpose(1, 2) for t in (B, C))

    def decays_and_states(self, span: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Of a block: decays, and the states after its tokens, each [b l n d].

        Args:
            state: [b n d], before the block.
        """
        dt = self.dt[:, span]
        decays = dt[:, :, None] * self.A
        # zero where it is as good as zero, so that its gradient times a rate of -inf is zero
        torch.threshold_(decays, SMALLEST_LOG_DECAY, -torch.inf).exp_()
        states = self.B[:, span, :, None] * (dt * self.u[:, span])[:, :, None]
        for decay, after in zip(decays.unbind(1), states.unbind(1), strict=True):
            state = after.addcmul_(decay, state)
        return decays, states


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [b l d], the last state [b n d], and with `keep` the states before the blocks."""
    tiles = _Tiles(dt, B)
    y = torch.empty_like(dt)
    last = dt.new_empty(tiles.rows, tiles.n, tiles.channels)
    kept = last.new_empty(tiles.blocks if keep else 0, *last.shape)
    for rows, channels, group in tiles.slices():
        inputs = _Slice((u, dt, A, B, C), rows, channels, group)
        state = torch.zeros_like(last[rows, :, channels])
        for i, span in enumerate(tiles.spans()):
            if keep:
                kept[i, rows, :, channels] = state
            _, states = inputs.decays_and_states(span, state)
            y[rows, span, channels] = torch.matmul(inputs.C[:, span, None], states)[:, :, 0]
            state = states[:, -1]
        last[rows, :, channels] = state
    return y, last, kept


def _backward(
    dy: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
) -> list[Tensor]:
    """The gradients of u, dt, A, B and C."""
    tiles = _Tiles(dt, B)
    du, ddt = torch.empty_like(dt), torch.empty_like(dt)
    dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    if dy is None:
        dy = torch.zeros_like(dt)
    for rows, channels, group in tiles.slices():
        inputs = _Slice((u, dt, A, B, C), rows, channels, group)
        of_B, of_C = (t[rows, group].transpose(1, 2) for t in (dB, dC))
        sums = torch.zeros_like(inputs.A)
        # the gradient of the state after a block
        after = None if dlast is None else dlast[rows, :, channels]
        for i, span in reversed(list(enumerate(tiles.spans()))):
            state, grad = kept[i, rows, :, channels], dy[rows, span, channels]
            decays, states = inputs.decays_and_states(span, state)
            step, x = inputs.dt[:, span], inputs.u[:, span]
            dstates = inputs.C[:, span, :, None] * grad[:, :, None]  # [b l n d]
            if after is not None:
                dstates[:, -1] += after
            for t in range(dstates.shape[1] - 1, 0, -1):
                dstates[:, t - 1].addcmul_(decays[:, t], dstates[:, t])
            after = decays[:, 0] * dstates[:, 0]
            of_C[:, span] += torch.matmul(states, grad[..., None])[..., 0]
            of_B[:, span] += torch.matmul(dstates, (step * x)[..., None])[..., 0]
            product = torch.matmul(inputs.B[:, span, None], dstates)[:, :, 0]  # [b l d]
            # the gradient of the log decays
            dlogs = decays.mul_(dstates)
            dlogs[:, 1:] *= states[:, :-1]
            dlogs[:, 0] *= state
            du[rows, span, channels] = product * step
            ddt[rows, span, channels] = (dlogs * inputs.A).sum(2).addcmul_(product, x)
            sums += dlogs.mul_(step[:, :, None]).sum((0, 1))
        dA[channels] += sums.t()
    return [du, ddt, dA, dB, dC]


_scan = torch.library.custom_op("ysnake::selective_scan", _forward, mutates_args=())
_scan_backward = torch.library.custom_op(
    "ysnake::selective_scan_backward", _backward, mutates_args=()
)


@_scan.register_fake
def _(u, dt, A, B, C, keep):
    tiles = _Tiles(dt, B)
    last = dt.new_empty(tiles.rows, tiles.n, tiles.channels)
    return torch.empty_like(dt), last, last.new_empty(tiles.blocks if keep else 0, *last.shape)


@_scan_backward.register_fake
def _(dy, dlast, u, dt, A, B, C, kept):
    return [torch.empty_like(t) for t in (dt, dt, A, B, C)]


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, backward, dy, dlast, _):
    return *backward(dy, dlast, *ctx.saved_tensors), None


_differentiable = Differentiable(_scan, _forward, _save, _differentiate, _scan_backward, _backward)
