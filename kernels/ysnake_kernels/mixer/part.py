"""The mixer over one part of each sequence, where other processes or devices have the other parts.

Parts exchange little. Forward, each part sends the part after it the last tokens before the
convolution and its last state. Backward sends the gradients of both to the part before. No part
waits for the scan of another: it first computes what it does to the state (ssd/segment.py), and
scans when it knows the state that enters.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels import conv, norm, ssd
from ysnake_kernels.backend import choose
from ysnake_kernels.checks import INTEGERS, check
from ysnake_kernels.linear import linear
from ysnake_kernels.mixer import check_mixer
from ysnake_kernels.mixer.inputs import SEQ_IDX, TENSORS, MixerInputs
from ysnake_kernels.numerics import log_decays, step_sizes
from ysnake_kernels.ssd.inputs import ScanInputs
from ysnake_kernels.ssd.segment import end_from_zero, start_gradient, whole_decay


class Neighbours(Protocol):
    """The parts before and after this one.

    A step of 1 leads to the part after, a step of -1 to the part before. The first and the last
    part have one neighbour only: what they send in the other direction is dropped, and what they
    receive from there is None.
    """

    def exchange(self, tensor: Tensor, step: int) -> Tensor | None:
        """Send a tensor one step on, and receive one of the same shape from one step back."""

    def receive(self, like: Tensor, step: int) -> Tensor | None:
        """Receive a tensor of the shape and dtype of `like` from one step back."""

    def send(self, tensor: Tensor, step: int) -> None:
        """Send a tensor one step on, without waiting for its arrival."""


def mixer_part(inputs: MixerInputs, neighbours: Neighbours) -> Tensor:
    """`mamba_split_conv1d_scan_combined` of this part of each sequence.

    The convolution is followed by SiLU, and the gate comes before the norm. All parts call it
    together, forward and backward. For backward it stores its arguments and what it received.

    Args:
        inputs: those of this part, with a norm and an output projection, without initial states.
            zxbcdt (batch, length, features) has at least width - 1 tokens, seq_idx (batch,
            1 + length) the documents of the token before this part and of its own tokens.
        neighbours: the parts before and after.

    Returns:
        (batch, length, d_model).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, section 8.2.
    """
    zxbcdt, seq_idx = inputs.zxbcdt, inputs.seq_idx
    check_mixer(inputs._replace(seq_idx=None))
    batch, length = zxbcdt.shape[:2]
    before = inputs.conv_weight.shape[1] - 1  # how many tokens before it the convolution reads
    if length < before:
        raise ValueError(f"zxbcdt: expected a length of at least {before}, got {length}")
    if seq_idx is not None:
        check("seq_idx", seq_idx, (batch, 1 + length), zxbcdt, "zxbcdt", INTEGERS)
    return _MixerPart.apply(neighbours, choose(zxbcdt), *inputs)


class _Borders:
    """Which tokens belong to the documents at this part's borders.

    All fields are None without documents: then all tokens belong to one.
    """

    def __init__(self, seq_idx: Tensor | None):
        self.documents = self.of_entering = self.of_last = self.enters = self.passes = None
        if seq_idx is not None:
            self.documents = seq_idx[:, 1:].contiguous()  # of this part's tokens
            # (batch, length): the tokens of the last document of the part before, and those of
            # the last document of this part
            self.of_entering = self.documents == seq_idx[:, :1]
            self.of_last = self.documents == self.documents[:, -1:]
            # (batch,): whether the document of the part before goes on here, and fills this part
            self.enters = self.of_entering[:, 0]
            self.passes = self.of_entering[:, -1]

    def last_tokens(self, xBC: Tensor, width: int) -> Tensor:
        """What the convolution of the part after reads of xBC (batch, channels, length)."""
        return self.of_last_document(xBC.detach()[:, :, 1 - width :]).contiguous()

    def of_last_document(self, tokens: Tensor) -> Tensor:
        """The last tokens (batch, channels, count), with zeros for those of other documents."""
        if self.of_last is None:
            return tokens
        return tokens * self.of_last[:, None, -tokens.shape[2] :]


def _where(t: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """t (batch, ...) where the mask (batch,) is true, else zero."""
    if t is None or mask is None:
        return t
    return t * mask.view(-1, *[1] * (t.ndim - 1)).to(t.dtype)


def _add_passed_on(to: Tensor, state: Tensor | None, decay: Tensor, borders: _Borders) -> None:
    """Add what passes through this part of a state (batch, heads, P, N), or of its gradient."""
    if state is not None:
        passes = _where(whole_decay(decay), borders.passes)
        assert passes is not None
        to += passes[..., None, None] * state


def _steps(scan: ScanInputs) -> tuple[Tensor, Tensor]:
    """The step sizes and the log decays of the scan's tokens, without gradients."""
    bias = None if scan.dt_bias is None else scan.dt_bias.detach()
    sizes = step_sizes(scan.dt.detach(), bias, True, scan.dt_limit, scan.accumulator)
    return sizes, log_decays(sizes, scan.A.detach())


def _before_scan(name: str, inputs: MixerInputs) -> tuple[Tensor, ScanInputs]:
    """z, and the inputs of the scan."""
    z, xBC, dt = inputs.sizes.split(inputs.zxbcdt)
    convolved, _ = conv.run(name, inputs.convolution(xBC))
    return z, inputs.scan(convolved.transpose(1, 2), dt)


def _after_scan(name: str, inputs: MixerInputs, y: Tensor, z: Tensor) -> Tensor:
    """Norm and output projection of the scan's output (batch, length, heads, P)."""
    normed = norm.run(name, inputs.norm(y.flatten(2), z), y.dtype)
    assert inputs.out_weight is not None
    return linear(normed, inputs.out_weight, inputs.out_bias)


class _MixerPart(torch.autograd.Function):
    """Saves its arguments and what it received; computes the rest again in backward."""

    @staticmethod
    def forward(ctx: Any, neighbours: Neighbours, name: str, *arguments: Any) -> Tensor:
        inputs = MixerInputs._make(arguments)
        borders, width = _Borders(inputs.seq_idx), inputs.conv_weight.shape[1]
        xBC = inputs.sizes.split(inputs.zxbcdt)[1].transpose(1, 2)
        edge = neighbours.exchange(borders.last_tokens(xBC, width), 1)
        edge = _where(edge, borders.enters)
        own = inputs._replace(conv_initial_states=edge, seq_idx=borders.documents)
        z, scan = _before_scan(name, own)

        steps, decay = _steps(scan)
        end = end_from_zero(scan.x, steps, decay, scan.B, borders.of_last)
        state = neighbours.receive(end, 1)
        _add_passed_on(end, state, decay, borders)
        neighbours.send(end, 1)

        state = _where(state, borders.enters)
        y, _ = ssd.run(name, scan._replace(initial_states=state))
        ctx.neighbours, ctx.name, ctx.options = neighbours, name, inputs[TENSORS:]
        device = inputs.zxbcdt.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        saved = inputs._replace(conv_initial_states=edge, initial_states=state)
        ctx.save_for_backward(*saved[:TENSORS])
        return _after_scan(name, own, y, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple:
        neighbours, name = ctx.neighbours, ctx.name
        saved = ctx.saved_tensors  # read once: torch's checkpoint allows no second time
        borders = _Borders(saved[SEQ_IDX])
        leaves = [
            t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
            for t in saved
        ]
        inputs = MixerInputs._make((*leaves, *ctx.options))._replace(seq_idx=borders.documents)
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            z, scan = _before_scan(name, inputs)
            y, end = ssd.run(name, scan)
            # The output gets a graph of its own: its gradient dy is needed before the gradient of
            # the final state is known.
            y_leaf, z_leaf = y.detach().requires_grad_(), z.detach().requires_grad_()
            out = _after_scan(name, inputs, y_leaf, z_leaf)
        tail = [inputs.norm_weight, inputs.out_weight, inputs.out_bias]
        given = [t for t in tail if t is not None]
        dy, dz, *dtail = torch.autograd.grad(out, [y_leaf, z_leaf, *given], dout)
        del out, y_leaf, z_leaf

        # What this part does to the gradient of the state, then what comes from the part after.
        _, decay = _steps(scan)
        dstate = start_gradient(dy, decay, scan.C.detach(), borders.of_entering)
        dend = neighbours.receive(dstate, -1)
        _add_passed_on(dstate, dend, decay, borders)
        neighbours.send(dstate, -1)

        roots, droots = [z, y], [dz, dy]
        if dend is not None:
            roots, droots = [*roots, end], [*droots, dend]
        head = [t for t in _before_tail(inputs) if t is not None]
        grads = iter([*torch.autograd.grad(roots, head, droots), *dtail])
        found = [None if t is None else next(grads) for t in (*_before_tail(inputs), *tail)]
        dzxbcdt, dedge, *dparameters = found
        assert dzxbcdt is not None
        _exchange_edges(ctx, inputs, borders, dzxbcdt, dedge)
        return None, None, dzxbcdt, None, None, None, *dparameters, *[None] * len(ctx.options)


def _before_tail(inputs: MixerInputs) -> tuple[Tensor | None, ...]:
    """The tensors with a gradient that are used before the norm."""
    return (
        *(inputs.zxbcdt, inputs.conv_initial_states, inputs.conv_weight, inputs.conv_bias),
        *(inputs.dt_bias, inputs.A, inputs.D),
    )


def _exchange_edges(
    ctx: Any, inputs: MixerInputs, borders: _Borders, dzxbcdt: Tensor, dedge: Tensor | None
) -> None:
    """Send the gradient of the tokens received, and add that of the tokens sent to dzxbcdt."""
    sizes, width = inputs.sizes, inputs.conv_weight.shape[1]
    if dedge is None:  # the first part received no tokens, but gets the gradient of those it sent
        xBC = sizes.split(inputs.zxbcdt)[1].transpose(1, 2)
        dedge = torch.empty_like(borders.last_tokens(xBC, width))
    dsent = ctx.neighbours.exchange(_where(dedge, borders.enters), -1)
    if dsent is not None:
        dxBC = sizes.split(dzxbcdt)[1][:, -dsent.shape[2] :].transpose(1, 2)
        dxBC += borders.of_last_document(dsent)
