"""The causal depthwise convolution in pure torch, channel-last, a block of tokens at a time.

The tokens that a tap sees are a slice of the input, so nothing is copied or padded, and what a
block needs stays in the cache. `forward` and `backward` are plain functions, for the mixer too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.backend import uncompiled
from ysnake_kernels.numerics import accumulator

BLOCK_ELEMENTS = 256 * 1024  # of a block: a megabyte in float32


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Arguments as `causal_conv1d` has checked them."""
    return uncompiled(_Conv.apply)(x, weight, bias, seq_idx, initial_states, activation)


def conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Arguments as `causal_conv1d_step` has checked them; `conv_state` is updated in place."""
    acc = accumulator(x, weight, bias, conv_state)
    rows = slice(None) if conv_state_indices is None else conv_state_indices
    tokens = torch.cat([conv_state[rows].to(acc), x[:, :, None].to(acc)], dim=2)
    conv_state[rows] = tokens[:, :, 1:].to(conv_state.dtype)
    y = tokens.mul_(weight.to(acc)).sum(2)
    if bias is not None:
        y += bias.to(acc)
    if activation is not None:
        y = F.silu(y, inplace=True)
    return y.to(x.dtype)


class _Conv(torch.autograd.Function):
    """Saves its inputs; recomputes everything else in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx, initial_states, activation):
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.activation = activation
        y = _like(x)
        forward(*_channel_last(x, weight, bias, seq_idx, initial_states, y), activation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        dx = _like(x)
        *arguments, dx_last = _channel_last(x, weight, bias, seq_idx, initial_states, dx)
        dy = dy.transpose(1, 2)
        dweight, dbias, dinitial = backward(*arguments, dy, dx_last, ctx.activation)
        if dinitial is not None:
            dinitial = dinitial.transpose(1, 2)
        return dx, dweight, dbias, None, dinitial, None


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, channel-last in memory if x is."""
    batch, channels, length = x.shape
    if x.stride(1) == 1:
        return torch.empty(batch, length, channels, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _channel_last(x, weight, bias, seq_idx, initial_states, y):
    if initial_states is not None:
        initial_states = initial_states.transpose(1, 2)
    return x.transpose(1, 2), weight, bias, seq_idx, initial_states, y.transpose(1, 2)


class _Blocks:
    """What each tap sees of x [batch length channels], one block of tokens after another."""

    def __init__(self, x, weight, bias, seq_idx, initial_states):
        self.acc = accumulator(x, weight, bias, initial_states)
        self.x, self.back = x, weight.shape[1] - 1
        self.taps = weight.to(self.acc).t().flip(0).contiguous()  # [k channels]: k tokens ago
        self.bias = None if bias is None else bias.to(self.acc)
        self.initial = None if initial_states is None else initial_states.to(self.acc)
        self.size = min(x.shape[1], max(1, BLOCK_ELEMENTS // (x.shape[0] * x.shape[2])))
        self.same = None
        if seq_idx is not None:  # same[k - 1]: the token k places before is of the same document
            padded = torch.cat([seq_idx[:, :1].expand(-1, self.back), seq_idx], 1)
            starts = range(self.back - 1, -1, -1)
            self.same = [seq_idx == padded[:, s : s + x.shape[1]] for s in starts]
            self.masked = self.buffer()

    def buffer(self) -> Tensor:
        """Flat memory for a block's values."""
        batch, _, channels = self.x.shape
        return torch.empty(batch * self.size * channels, dtype=self.acc, device=self.x.device)

    def spans(self) -> list[tuple[int, int]]:
        length = self.x.shape[1]
        return [(s, min(s + self.size, length)) for s in range(0, length, self.size)]

    def seen(self, k: int, start: int, end: int) -> list[tuple[slice, Tensor, slice | None]]:
        """What lies k tokens before [start, end): (tokens of the block, values, place in x).

        The place is None, and the values of the initial states, for what lies before x.
        """
        parts = []
        first = min(max(start, k), end)  # before it, the token k places ago is not of x
        if start < first and self.initial is not None:
            values = self.initial[:, start + self.back - k : first + self.back - k]
            parts.append((slice(0, first - start), values, None))
        if first < end:
            place = slice(first - k, end - k)
            parts.append((slice(first - start, end - start), self.x[:, place].to(self.acc), place))
        return parts

    def of_same(self, t: Tensor, k: int, start: int, tokens: slice) -> Tensor:
        """t [batch tokens channels]; zero where the k-th token before is of another document."""
        if self.same is None:
            return t
        same = self.same[k - 1][:, start + tokens.start : start + tokens.stop, None]
        return torch.mul(t, same, out=_part(self.masked, t))

    def sums(self, start: int, end: int, out: Tensor) -> Tensor:
        """The convolution of a block before the activation, written to out."""
        x = self.x[:, start:end].to(self.acc)
        if self.bias is None:
            torch.mul(x, self.taps[0], out=out)
        else:
            torch.addcmul(self.bias, x, self.taps[0], out=out)
        for k in range(1, self.back + 1):
            for tokens, values, _ in self.seen(k, start, end):
                out[:, tokens].addcmul_(self.of_same(values, k, start, tokens), self.taps[k])
        return out


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    y: Tensor,
    activation: str | None,
    sums: Tensor | None = None,
) -> None:
    """Writes y; x and y are [batch length channels], initial_states [batch width-1 channels].

    `sums`, if given, gets what the activation is applied to, in float32 or float64.
    """
    blocks = _Blocks(x, weight, bias, seq_idx, initial_states)
    buffer = blocks.buffer() if sums is None else None
    for start, end in blocks.spans():
        block = y[:, start:end]
        out = _part(buffer, block) if sums is None else sums[:, start:end]
        blocks.sums(start, end, out)
        if activation is None:
            block.copy_(out)
        elif y.dtype == out.dtype:
            torch.ops.aten.silu.out(out, out=block)
        else:
            block.copy_(F.silu(out))


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    activation: str | None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes dx; returns the gradients of weight, bias and initial_states. Layouts as `forward`.

    `sums` are as `forward` gave them; None computes them again.
    """
    blocks = _Blocks(x, weight, bias, seq_idx, initial_states)
    exact = dx if dx.dtype == blocks.acc else torch.empty_like(dx, dtype=blocks.acc)
    totals = blocks.taps.new_zeros(len(blocks.taps), len(x), blocks.size, x.shape[2])
    dbias = torch.zeros_like(blocks.taps[0])
    dinitial = None if initial_states is None else torch.zeros_like(blocks.initial)
    grads = blocks.buffer()
    for start, end in blocks.spans():
        grad = dy[:, start:end].to(blocks.acc)
        if activation is not None:
            out = _part(grads, grad)
            before = blocks.sums(start, end, out) if sums is None else sums[:, start:end]
            grad = torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=out)
        dbias += grad.sum((0, 1))
        torch.mul(grad, blocks.taps[0], out=exact[:, start:end])
        totals[0][:, : end - start].addcmul_(x[:, start:end].to(blocks.acc), grad)
        for k in range(1, blocks.back + 1):
            for tokens, values, place in blocks.seen(k, start, end):
                part = blocks.of_same(grad[:, tokens], k, start, tokens)
                totals[k][:, tokens].addcmul_(values, part)
                to = exact[:, place]
                if place is None:
                    to = dinitial[:, start + tokens.start + blocks.back - k :][:, : part.shape[1]]
                to.addcmul_(part, blocks.taps[k])
    if exact is not dx:
        dx.copy_(exact)
    dweight = totals.sum((1, 2)).flip(0).t().to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dweight, dbias, None if dinitial is None else dinitial.to(initial_states.dtype)


def _part(buffer: Tensor, like: Tensor) -> Tensor:
    """Memory of a flat buffer in the shape of another tensor; contiguous, so that sums are fast."""
    return buffer[: like.numel()].view(like.shape)
