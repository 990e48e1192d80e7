"""The causal depthwise convolution in pure torch, a block of tokens at a time.

Each block is copied once, with the tokens before it, into a channel-last buffer that stays in the
cache; taps, SiLU and their gradients work on it in place. Backward recomputes from the inputs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.numerics import accumulator

BLOCK_ELEMENTS = 128 * 1024  # of a buffer: half a megabyte in float32


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Arguments as `causal_conv1d` has checked them."""
    return _Conv.apply(x, weight, bias, seq_idx, initial_states, activation is not None)


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
        y = torch.nn.functional.silu(y, inplace=True)
    return y.to(x.dtype)


class _Blocks:
    """x cut into blocks of tokens, channel-last, each with the width - 1 tokens before it."""

    def __init__(self, x, weight, seq_idx, initial_states, acc):
        self.batch, self.channels, self.length = x.shape
        self.back = weight.shape[1] - 1
        self.x, self.acc = x.transpose(1, 2), acc
        self.taps = weight.to(acc).t().contiguous()  # [width channels]
        self.initial_states = initial_states
        self.size = min(self.length, max(1, BLOCK_ELEMENTS // (self.batch * self.channels)))
        self.same = None
        if seq_idx is not None:  # same[k]: the token k places before belongs to the same document
            self.same = [torch.ones_like(seq_idx, dtype=torch.bool)]
            for k in range(1, self.back + 1):
                first = seq_idx[:, :1].expand(-1, k)
                shifted = torch.cat([first, seq_idx], 1)[:, : self.length]
                self.same.append(seq_idx == shifted)

    def spans(self) -> list[slice]:
        starts = range(0, self.length, self.size)
        return [slice(s, min(s + self.size, self.length)) for s in starts]

    def buffer(self, extra: int = 0) -> Tensor:
        shape = (self.batch, self.size + extra, self.channels)
        return torch.empty(shape, dtype=self.acc, device=self.x.device)

    def load(self, buffer: Tensor, span: slice) -> Tensor:
        """The block's tokens behind those before it, [batch (back + tokens) channels]."""
        block = buffer[:, : self.back + span.stop - span.start]
        before = min(span.start, self.back)  # tokens before the block that x itself has
        missing = self.back - before
        if missing and self.initial_states is None:
            block[:, :missing] = 0
        elif missing:
            block[:, :missing] = self.initial_states[:, :, before:].transpose(1, 2)
        block[:, missing:] = self.x[:, span.start - before : span.stop]
        return block

    def tap(self, block: Tensor, k: int, span: slice) -> Tensor:
        """What tap k multiplies: the tokens back - k places before, zero in another document."""
        tokens = block[:, k : k + span.stop - span.start]
        if self.same is not None and k < self.back:
            tokens = tokens * self.same[self.back - k][:, span, None]
        return tokens

    def sums(self, block: Tensor, bias: Tensor | None, span: slice, out: Tensor) -> Tensor:
        """The convolution of a block before the activation, [batch tokens channels]."""
        out = out[:, : span.stop - span.start]
        torch.mul(self.tap(block, self.back, span), self.taps[self.back], out=out)
        if bias is not None:
            out += bias.to(self.acc)
        for k in range(self.back):
            out.addcmul_(self.tap(block, k, span), self.taps[k])
        return out


class _Conv(torch.autograd.Function):
    """Saves its inputs; recomputes everything else in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx, initial_states, activation):
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.activation = activation
        acc = accumulator(x, weight, bias, initial_states)
        blocks = _Blocks(x, weight, seq_idx, initial_states, acc)
        tokens, sums = blocks.buffer(extra=blocks.back), blocks.buffer()
        y = _like(x)
        for span in blocks.spans():
            out = blocks.sums(blocks.load(tokens, span), bias, span, sums)
            if activation:
                torch.nn.functional.silu(out, inplace=True)
            y[:, :, span] = out.transpose(1, 2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        acc = accumulator(x, weight, bias, initial_states)
        blocks = _Blocks(x, weight, seq_idx, initial_states, acc)
        tokens, sums = blocks.buffer(extra=blocks.back), blocks.buffer()
        grads, grad_in = blocks.buffer(), blocks.buffer(extra=blocks.back)
        dx = _like(x)
        dtaps = torch.zeros_like(blocks.taps)
        dbias = torch.zeros_like(blocks.taps[0])
        # Walking backward, each block also holds the gradient of the tokens before it.
        carried = torch.zeros_like(grad_in[:, : blocks.back])
        for span in reversed(blocks.spans()):
            size = span.stop - span.start
            block = blocks.load(tokens, span)
            grad = grads[:, :size]
            grad.copy_(dy[:, :, span].transpose(1, 2))
            if ctx.activation:
                out = blocks.sums(block, bias, span, sums)
                gate = torch.sigmoid(out)
                grad.mul_(gate)  # silu'(v) = sigmoid(v) (1 + v (1 - sigmoid(v)))
                grad.mul_(gate.neg_().add_(1).mul_(out).add_(1))
            dbias += grad.sum((0, 1))
            dtokens = grad_in[:, : blocks.back + size]
            dtokens[:, :size].zero_()
            dtokens[:, size:].copy_(carried)
            for k in range(blocks.back + 1):
                dtaps[k] += (blocks.tap(block, k, span) * grad).sum((0, 1))
                part = grad
                if blocks.same is not None and k < blocks.back:
                    part = grad * blocks.same[blocks.back - k][:, span, None]
                dtokens[:, k : k + size].addcmul_(part, blocks.taps[k])
            dx[:, :, span] = dtokens[:, blocks.back :].transpose(1, 2)
            carried.copy_(dtokens[:, : blocks.back])
        dweight = dtaps.t().to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        dinitial = None
        if initial_states is not None:
            dinitial = carried.transpose(1, 2).to(initial_states.dtype)
        return dx, dweight, dbias, None, dinitial, None


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, channel-last in memory if x is."""
    batch, channels, length = x.shape
    if x.stride(1) == 1:
        return torch.empty(batch, length, channels, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
