"""The causal depthwise convolution in pure torch, channel-last, a block of tokens at a time.

The tokens that a tap sees are a slice of the input, so nothing is copied or padded, and what a
block needs stays in the cache. `forward` and `backward` are plain functions, for the mixer too.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.custom_op import Differentiable, empty_gradients, with_none, without_none
from ysnake_kernels.memory import empty_like
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
    return _differentiable(x, weight, bias, seq_idx, initial_states, activation is not None)


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
    size, width = conv_state.shape[2], weight.shape[1]
    in_place = conv_state_indices is None and conv_state.is_contiguous()
    if in_place and size >= width and x.dtype == conv_state.dtype:
        flat = conv_state.view(-1)  # all rows move on by a token at once
        flat[:-1] = flat[1:].clone()
        conv_state[:, :, -1] = x
        tokens = conv_state.to(acc)
    else:
        rows = slice(None) if conv_state_indices is None else conv_state_indices
        kept = conv_state[rows][:, :, 1 if size >= width else 0 :]
        tokens = torch.cat([kept.to(acc), x[:, :, None].to(acc)], dim=2)
        conv_state[rows] = tokens[:, :, -size:].to(conv_state.dtype)
    products = tokens[:, :, -width:] * weight.to(acc)
    # a product of matrices takes half of the time of sum(2)
    y = (products.flatten(0, 1) @ products.new_ones(width)).view(x.shape)
    if bias is not None:
        y += bias.to(acc)
    if activation is not None:
        y = F.silu(y, inplace=True)
    return y.to(x.dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: bool,
) -> Tensor:
    y = empty_like(x)
    forward(*_channel_last(x, weight, bias, seq_idx, initial_states, y), activation)
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: bool,
) -> list[Tensor]:
    dx = empty_like(x)
    *arguments, dx_last = _channel_last(x, weight, bias, seq_idx, initial_states, dx)
    dweight, dbias, dinitial = backward(*arguments, dy.transpose(1, 2), dx_last, activation)
    if dinitial is not None:
        dinitial = dinitial.transpose(1, 2).contiguous()
    return without_none((dx, dweight, dbias, dinitial))


_conv = torch.library.custom_op("ysnake::conv_eager", _forward, mutates_args=())
_conv_backward = torch.library.custom_op("ysnake::conv_eager_backward", _backward, mutates_args=())


@_conv.register_fake
def _(x, weight, bias, seq_idx, initial_states, activation):
    return empty_like(x)


@_conv_backward.register_fake
def _(dy, x, weight, bias, seq_idx, initial_states, activation):
    return [empty_like(x), *empty_gradients(weight, bias, initial_states)]


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, backward, dy):
    x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
    grads = backward(dy, x, weight, bias, seq_idx, initial_states, ctx.activation)
    dx, *given = with_none(grads, (x, weight, bias, initial_states))
    return dx, *given[:2], None, given[2], None


_differentiable = Differentiable(_conv, _forward, _save, _differentiate, _conv_backward, _backward)


def _channel_last(x, weight, bias, seq_idx, initial_states, y):
    if initial_states is not None:
        initial_states = initial_states.transpose(1, 2)
    return x.transpose(1, 2), weight, bias, seq_idx, initial_states, y.transpose(1, 2)


class _Blocks:
    """What the taps see of x [batch length channels], one block of tokens after another.

    The first tokens, which see what was before x, are a block of their own.
    """

    def __init__(self, x, weight, bias, seq_idx, initial_states):
        self.acc = accumulator(x, weight, bias, initial_states)
        self.x, self.width = x, weight.shape[1]
        self.taps = weight.to(self.acc).t().flip(0).contiguous()  # [k channels]: k tokens ago
        self.bias = None if bias is None else bias.to(self.acc)
        batch, length, channels = x.shape
        back = self.back = self.width - 1
        if initial_states is None:
            initial_states = x.new_zeros(batch, back, channels)
        self.edge = torch.cat([initial_states.to(self.acc), x[:, :back].to(self.acc)], 1)
        first, size = min(back, length), max(back, BLOCK_ELEMENTS // (batch * channels))
        starts = range(first, length, size)
        self.spans = [(0, first), *((s, min(s + size, length)) for s in starts)]
        self.largest = max(end - start for start, end in self.spans)
        self.same = None
        if seq_idx is not None:  # same[b, t, k]: the token k places before is of the same document
            padded = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], 1)
            self.same = padded.unfold(1, self.width, 1).flip(2) == seq_idx[..., None]
            self.masked = self.buffer()

    def buffer(self) -> Tensor:
        """Flat memory for a block's values."""
        size = len(self.x) * self.largest * self.x.shape[2]
        return torch.empty(size, dtype=self.acc, device=self.x.device)

    def seen(self, start: int, end: int) -> Sequence[Tensor]:
        """The tokens 0, 1, ... places before those of a block, each [batch tokens channels]."""
        return self.views(self.edge, self.x, start, end)

    def views(self, edge: Tensor, t: Tensor, start: int, end: int) -> Sequence[Tensor]:
        """`seen` of another tensor, and of another edge."""
        t = edge if start == 0 else t[:, start - self.back : end].to(self.acc)
        return t.unfold(1, self.width, 1).unbind(3)[::-1]

    def of_same(self, t: Tensor, k: int, start: int, end: int) -> Tensor:
        """t [batch tokens channels]; zero where the k-th token before is of another document."""
        if self.same is None:
            return t
        return torch.mul(t, self.same[:, start:end, k, None], out=_part(self.masked, t))

    def sums(self, start: int, end: int, out: Tensor) -> Tensor:
        """The convolution of a block before the activation, written to out."""
        x, *before = self.seen(start, end)
        if self.bias is None:
            torch.mul(x, self.taps[0], out=out)
        else:
            torch.addcmul(self.bias, x, self.taps[0], out=out)
        for k, values in enumerate(before, 1):
            out.addcmul_(self.of_same(values, k, start, end), self.taps[k])
        return out


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    y: Tensor,
    activation: bool,
    sums: Tensor | None = None,
) -> None:
    """Writes y; x and y are [batch length channels], initial_states [batch width-1 channels].

    `sums`, if given, gets what the activation is applied to, in float32 or float64.
    """
    blocks = _Blocks(x, weight, bias, seq_idx, initial_states)
    buffer = blocks.buffer() if sums is None else None
    for start, end in blocks.spans:
        block = y[:, start:end]
        out = _part(buffer, block) if sums is None else sums[:, start:end]
        blocks.sums(start, end, out)
        if not activation:
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
    activation: bool,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes dx; returns the gradients of weight, bias and initial_states. Layouts as `forward`.

    `sums` are as `forward` gave them; None computes them again.
    """
    blocks = _Blocks(x, weight, bias, seq_idx, initial_states)
    exact = dx if dx.dtype == blocks.acc else torch.empty_like(dx, dtype=blocks.acc)
    totals = blocks.taps.new_zeros(blocks.width, len(x), blocks.largest, x.shape[2])
    dbias = torch.zeros_like(blocks.taps[0])
    dedge = torch.zeros_like(blocks.edge)
    grads = blocks.buffer()
    for start, end in blocks.spans:
        grad = dy[:, start:end].to(blocks.acc)
        if activation:
            out = _part(grads, grad)
            before = blocks.sums(start, end, out) if sums is None else sums[:, start:end]
            grad = torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=out)
        dbias += grad.sum((0, 1))
        seen, dseen = blocks.seen(start, end), blocks.views(dedge, exact, start, end)
        torch.mul(grad, blocks.taps[0], out=dseen[0])
        for k, total in enumerate(totals[:, :, : end - start]):
            part = blocks.of_same(grad, k, start, end) if k else grad
            total.addcmul_(seen[k], part)
            if k:
                dseen[k].addcmul_(part, blocks.taps[k])
        if start == 0:
            exact[:, :end] = dedge[:, blocks.back :]
    if exact is not dx:
        dx.copy_(exact)
    dweight = totals.sum((1, 2)).flip(0).t().to(weight.dtype).contiguous()
    dbias = None if bias is None else dbias.to(bias.dtype)
    dinitial = None
    if initial_states is not None:
        dinitial = dedge[:, : blocks.back].to(initial_states.dtype)
    return dweight, dbias, dinitial


def _part(buffer: Tensor, like: Tensor) -> Tensor:
    """Memory of a flat buffer in the shape of another tensor; contiguous, so that sums are fast."""
    return buffer[: like.numel()].view(like.shape)
