"""The causal depthwise convolution in pure torch.

It works on channel-last views, one block of tokens at a time. What a tap reads is a slice of the
input, so nothing is copied or padded, and the temporaries of a block stay in the cache. The mixer
calls `forward` and `backward`, which are plain functions without autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.conv.inputs import ConvInputs
from ysnake_kernels.custom_op import Differentiable, empty_gradients, with_none, without_none
from ysnake_kernels.memory import empty_like
from ysnake_kernels.numerics import accumulator

BLOCK_ELEMENTS = 256 * 1024  # of a block: a megabyte in float32


def conv(inputs: ConvInputs) -> Tensor:
    """y of `causal_conv1d`, for inputs that it has checked."""
    return _differentiable(*inputs)


def conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    indices: Tensor | None,
) -> Tensor:
    """y of `causal_conv1d_step`, for checked arguments; `conv_state` is updated in place."""
    acc = accumulator(x, weight, bias, conv_state)
    size, width = conv_state.shape[2], weight.shape[1]
    in_place = indices is None and conv_state.is_contiguous()
    if in_place and size >= width and x.dtype == conv_state.dtype:
        flat = conv_state.view(-1)  # one copy moves the tokens of all rows by one place
        flat[:-1] = flat[1:].clone()
        conv_state[:, :, -1] = x
        tokens = conv_state.to(acc)
    else:
        rows = slice(None) if indices is None else indices
        kept = conv_state[rows][:, :, 1 if size >= width else 0 :]
        tokens = torch.cat([kept.to(acc), x[:, :, None].to(acc)], dim=2)
        conv_state[rows] = tokens[:, :, -size:].to(conv_state.dtype)
    products = tokens[:, :, -width:] * weight.to(acc)
    # a product with a vector of ones takes half the time of sum(2)
    y = (products.flatten(0, 1) @ products.new_ones(width)).view(x.shape)
    if bias is not None:
        y += bias.to(acc)
    if silu:
        y = F.silu(y, inplace=True)
    return y.to(x.dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> Tensor:
    y = empty_like(x)
    forward(ConvInputs(x, weight, bias, seq_idx, initial_states, silu), y.transpose(1, 2))
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    inputs = ConvInputs(x, weight, bias, seq_idx, initial_states, silu)
    dx = empty_like(x)
    dweight, dbias, dinitial = backward(inputs, dy.transpose(1, 2), dx.transpose(1, 2))
    if dinitial is not None:
        dinitial = dinitial.contiguous()
    return without_none((dx, dweight, dbias, dinitial))


_conv = torch.library.custom_op("ysnake::conv_eager", _forward, mutates_args=())
_conv_backward = torch.library.custom_op("ysnake::conv_eager_backward", _backward, mutates_args=())


@_conv.register_fake
def _(x, weight, bias, seq_idx, initial_states, silu):
    return empty_like(x)


@_conv_backward.register_fake
def _(dy, x, weight, bias, seq_idx, initial_states, silu):
    return [empty_like(x), *empty_gradients(weight, bias, initial_states)]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, backward: Callable, dy: Tensor) -> tuple:
    x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
    grads = backward(dy, x, weight, bias, seq_idx, initial_states, ctx.silu)
    dx, *given = with_none(grads, (x, weight, bias, initial_states))
    return dx, *given[:2], None, given[2], None


_differentiable = Differentiable(_conv, _forward, _save, _differentiate, _conv_backward, _backward)


class _Blocks:
    """The input cut into blocks of tokens, with views of what each tap reads in a block.

    The first width - 1 tokens are a block of their own, since their taps also read the history.
    `edge` holds the history and these tokens. All tensors here are [batch tokens channels].
    """

    def __init__(self, inputs: ConvInputs):
        weight, bias, seq_idx = inputs.weight, inputs.bias, inputs.seq_idx
        history = inputs.initial_states
        self.acc = accumulator(inputs.x, weight, bias, history)
        self.x, self.width = inputs.x.transpose(1, 2), inputs.width
        self.taps = weight.to(self.acc).t().flip(0).contiguous()  # [k channels]: k tokens ago
        self.bias = None if bias is None else bias.to(self.acc)
        batch, length, channels = self.x.shape
        back = self.back = self.width - 1
        if history is None:
            history = self.x.new_zeros(batch, channels, back)
        before = history.transpose(1, 2).to(self.acc)
        self.edge = torch.cat([before, self.x[:, :back].to(self.acc)], 1)
        first, size = min(back, length), max(back, BLOCK_ELEMENTS // max(1, batch * channels))
        starts = range(first, length, size)
        self.spans = [(0, first), *((s, min(s + size, length)) for s in starts)]
        self.largest = max(end - start for start, end in self.spans)
        # same[b, t, k]: whether the token k places before token t is of the same document
        self.same: Tensor | None = None
        if seq_idx is not None:
            padded = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], 1)
            self.same = padded.unfold(1, self.width, 1).flip(2) == seq_idx[..., None]
            self.masked = self.buffer()

    def buffer(self) -> Tensor:
        """Flat memory for the values of the largest block."""
        size = len(self.x) * self.largest * self.x.shape[2]
        return torch.empty(size, dtype=self.acc, device=self.x.device)

    def read(self, start: int, end: int) -> Sequence[Tensor]:
        """What the taps of a block read: view k has the tokens k places before the block's."""
        return self.views(self.edge, self.x, start, end)

    def views(self, edge: Tensor, t: Tensor, start: int, end: int) -> Sequence[Tensor]:
        """As `read`, but views of `t` and `edge`, which have the shapes of x and its edge."""
        t = edge if start == 0 else t[:, start - self.back : end].to(self.acc)
        return t.unfold(1, self.width, 1).unbind(3)[::-1]

    def within_document(self, t: Tensor, k: int, start: int, end: int) -> Tensor:
        """t, with zeros where the token k places before is of another document."""
        if self.same is None:
            return t
        return torch.mul(t, self.same[:, start:end, k, None], out=_part(self.masked, t))

    def sums(self, start: int, end: int, out: Tensor) -> Tensor:
        """Write the convolution of a block before the activation to `out`."""
        x, *before = self.read(start, end)
        if self.bias is None:
            torch.mul(x, self.taps[0], out=out)
        else:
            torch.addcmul(self.bias, x, self.taps[0], out=out)
        for k, values in enumerate(before, 1):
            out.addcmul_(self.within_document(values, k, start, end), self.taps[k])
        return out


def forward(inputs: ConvInputs, y: Tensor, sums: Tensor | None = None) -> None:
    """Write the output to y [batch length channels].

    `sums`, if given, receives the values before the activation, in float32 or float64.
    """
    blocks = _Blocks(inputs)
    buffer = blocks.buffer() if sums is None else sums
    for start, end in blocks.spans:
        block = y[:, start:end]
        out = _part(buffer, block) if sums is None else sums[:, start:end]
        blocks.sums(start, end, out)
        if not inputs.silu:
            block.copy_(out)
        elif y.dtype == out.dtype:
            torch.ops.aten.silu.out(out, out=block)
        else:
            block.copy_(F.silu(out))


def backward(
    inputs: ConvInputs, dy: Tensor, dx: Tensor, sums: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Write the gradient of x to dx; return those of weight, bias and initial_states.

    dy and dx are [batch length channels]. `sums` are those that `forward` wrote; without them they
    are computed again.
    """
    blocks = _Blocks(inputs)
    exact = dx if dx.dtype == blocks.acc else torch.empty_like(dx, dtype=blocks.acc)
    totals = blocks.taps.new_zeros(blocks.width, len(dx), blocks.largest, dx.shape[2])
    dbias = torch.zeros_like(blocks.taps[0])
    dedge = torch.zeros_like(blocks.edge)
    grads = blocks.buffer()
    for start, end in blocks.spans:
        grad = dy[:, start:end].to(blocks.acc)
        if inputs.silu:
            out = _part(grads, grad)
            before = blocks.sums(start, end, out) if sums is None else sums[:, start:end]
            grad = torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=out)
        dbias += grad.sum((0, 1))
        read, dread = blocks.read(start, end), blocks.views(dedge, exact, start, end)
        torch.mul(grad, blocks.taps[0], out=dread[0])
        for k, total in enumerate(totals[:, :, : end - start]):
            part = blocks.within_document(grad, k, start, end) if k else grad
            total.addcmul_(read[k], part)
            if k:
                dread[k].addcmul_(part, blocks.taps[k])
        if start == 0:
            exact[:, :end] = dedge[:, blocks.back :]
    if exact is not dx:
        dx.copy_(exact)
    weight, bias, history = inputs.weight, inputs.bias, inputs.initial_states
    dweight = totals.sum((1, 2)).flip(0).t().to(weight.dtype).contiguous()
    dhistory = None
    if history is not None:
        dhistory = dedge[:, : blocks.back].to(history.dtype).transpose(1, 2)
    return dweight, None if bias is None else dbias.to(bias.dtype), dhistory


def _part(buffer: Tensor, like: Tensor) -> Tensor:
    """The start of a flat buffer in the shape of `like`; contiguous, so that sums are fast."""
    return buffer[: like.numel()].view(like.shape)
