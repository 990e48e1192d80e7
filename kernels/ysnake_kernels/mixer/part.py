"""The mixer over a part of sequences whose other parts are elsewhere, on other devices say.

Forward it hands on the last tokens before the convolution and the state after its last token, and
takes in those of the part before; backward it does so with their gradients, the other way. That is
all that passes between parts, and no part waits for another's scan: each computes what it does to
the state (ssd/segment.py) first, and scans when it knows the state that enters.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ysnake_kernels.backend import backend, choose
from ysnake_kernels.checks import INTEGERS, check
from ysnake_kernels.conv import causal_conv1d
from ysnake_kernels.linear import linear
from ysnake_kernels.mixer import check_sizes
from ysnake_kernels.mixer.composed import scan_inputs
from ysnake_kernels.norm import rms_norm_gated
from ysnake_kernels.numerics import accumulator, log_decays, step_sizes
from ysnake_kernels.ssd import ssd_scan
from ysnake_kernels.ssd.segment import end_from_zero, start_gradient, whole_decay


class Neighbours(Protocol):
    """The parts before and after this one. A step of 1 leads to the part after, -1 to that before;
    what there is nobody to send to is dropped, what nobody sends is None.
    """

    def exchange(self, tensor: Tensor, step: int) -> Tensor | None:
        """Send a tensor a step on, and receive the one of the same shape from a step back."""

    def receive(self, like: Tensor, step: int) -> Tensor | None:
        """Receive a tensor of that shape and dtype from a step back."""

    def send(self, tensor: Tensor, step: int) -> None:
        """Send a tensor a step on, without waiting until it is there."""


def mixer_part(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int | None,
    neighbours: Neighbours,
    seq_idx: Tensor | None,
    dt_limit: tuple[float, float],
    rmsnorm_weight: Tensor,
    rmsnorm_eps: float,
    outproj_weight: Tensor,
    outproj_bias: Tensor | None,
    ngroups: int,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` of this part, with SiLU and the gate before the norm.

    All parts call it together, forward and backward. Saves its arguments and what it received.

    Args:
        zxbcdt: (batch, length, features), this part; at least as long as the convolution reaches.
        neighbours: those that have the parts before and after.
        seq_idx: (batch, 1 + length), the documents of the token before this part and of its own.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, section 8.2.
    """
    sizes = check_sizes(zxbcdt, conv1d_weight, A, None, ngroups)
    batch, length = zxbcdt.shape[:2]
    reach = conv1d_weight.shape[1] - 1
    if length < reach:
        raise ValueError(f"zxbcdt: expected a length of at least {reach}, got {length}")
    if seq_idx is not None:
        check("seq_idx", seq_idx, (batch, 1 + length), zxbcdt, "zxbcdt", INTEGERS)
    part = _Part(sizes, ngroups, chunk_size, dt_limit, rmsnorm_eps, choose(zxbcdt), neighbours)
    parameters = (conv1d_weight, conv1d_bias, dt_bias, A, D)
    tail = (rmsnorm_weight, outproj_weight, outproj_bias)
    return _MixerPart.apply(part, seq_idx, zxbcdt, *parameters, *tail)


class _Part:
    """The pieces of the mixer, each on its own graph in backward."""

    def __init__(self, sizes, ngroups, chunk_size, dt_limit, eps, name, neighbours):
        self.sizes, self.ngroups, self.eps = sizes, ngroups, eps
        self.chunk_size, self.dt_limit = chunk_size, dt_limit
        self.name, self.neighbours = name, neighbours

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (batch, length, d_inner); xBC (batch, channels, length); dt."""
        z, xBC, dt = zxbcdt.split(self.sizes, dim=-1)
        return z, xBC.transpose(1, 2), dt

    def convolve(self, xBC, weight, bias, edge, docs) -> tuple[Tensor, Tensor, Tensor]:
        mixed = causal_conv1d(xBC, weight, bias, docs, edge, activation="silu")
        return scan_inputs(mixed.transpose(1, 2), self.sizes, self.ngroups)

    def scan(self, x, dt, A, B, C, D, dt_bias, state, docs) -> tuple[Tensor, Tensor]:
        return ssd_scan(
            *(x, dt, A, B, C, self.chunk_size, D),
            dt_bias=dt_bias,
            initial_states=state,
            seq_idx=docs,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=True,
        )

    def finish(self, y, z, norm, projection, shift) -> Tensor:
        group_size = self.sizes[0] // self.ngroups
        y = rms_norm_gated(y.flatten(2), norm, None, z, self.eps, group_size, False)
        return linear(y, projection, shift)

    def log_decays(self, dt, dt_bias, A, acc) -> tuple[Tensor, Tensor]:
        """dt as the recurrence uses it, and dt A as the scan uses it."""
        dt = step_sizes(dt, dt_bias, True, self.dt_limit, acc)
        return dt, log_decays(dt, A)


class _Borders:
    """Which tokens the documents of this part's borders have. Without documents: all."""

    def __init__(self, seq_idx: Tensor | None):
        self.docs = self.of_first = self.of_last = self.enters = self.passes = None
        if seq_idx is not None:
            self.docs = seq_idx[:, 1:].contiguous()
            self.of_first = self.docs == seq_idx[:, :1]  # tokens of the document that comes in
            self.of_last = self.docs == self.docs[:, -1:]
            self.enters = self.of_first[:, 0]  # (batch,), whether that document has any
            self.passes = self.of_first[:, -1]


def _where(t: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """t (batch, ...) where the mask (batch,) is true, else zero."""
    if t is None or mask is None:
        return t
    return t * mask.view(-1, *[1] * (t.ndim - 1)).to(t.dtype)


class _MixerPart(torch.autograd.Function):
    """Saves its arguments and what came over the border; computes the rest again in backward."""

    @staticmethod
    def forward(ctx, part, seq_idx, zxbcdt, weight, bias, dt_bias, A, D, norm, projection, shift):
        borders, near = _Borders(seq_idx), part.neighbours
        acc = accumulator(zxbcdt, dt_bias, A, D)
        z, xBC, dt = part.split(zxbcdt)
        edge = near.exchange(_edge(xBC, weight, borders), 1)
        edge = _where(edge, borders.enters)
        x, B, C = part.convolve(xBC, weight, bias, edge, borders.docs)

        dts, decay = part.log_decays(dt, dt_bias, A, acc)
        end = end_from_zero(x, dts, decay, B, borders.of_last)
        state = near.receive(end, 1)
        if state is not None:
            end += _where(whole_decay(decay), borders.passes)[..., None, None] * state
            state = _where(state, borders.enters)
        near.send(end, 1)

        y, _ = part.scan(x, dt, A, B, C, D, dt_bias, state, borders.docs)
        ctx.part, ctx.seq_idx, ctx.acc = part, seq_idx, acc
        device = zxbcdt.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(
            *(zxbcdt, weight, bias, dt_bias, A, D, norm, projection, shift, edge, state)
        )
        return part.finish(y, z, norm, projection, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        part, borders, near = ctx.part, _Borders(ctx.seq_idx), ctx.part.neighbours
        leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        zxbcdt, weight, bias, dt_bias, A, D, norm, projection, shift, edge, state = leaves
        # backward may run in a thread that does not know of an override
        with torch.enable_grad(), backend(part.name), torch.autocast(*ctx.autocast):
            z, xBC, dt = part.split(zxbcdt)
            x, B, C = part.convolve(xBC, weight, bias, edge, borders.docs)
            y, end = part.scan(x, dt, A, B, C, D, dt_bias, state, borders.docs)
            y_, z_ = y.detach().requires_grad_(), z.detach().requires_grad_()
            out = part.finish(y_, z_, norm, projection, shift)
        after_y = [y_, z_, norm, projection, *([] if shift is None else [shift])]
        dy, dz, *dtail = torch.autograd.grad(out, after_y, dout)
        del out, y_, z_

        # What this part does to the gradient of the state, then what comes from the part after.
        _, decay = part.log_decays(dt.detach(), dt_bias.detach(), A.detach(), ctx.acc)
        dstate = start_gradient(dy, decay, C.detach(), borders.of_first)
        dend = near.receive(dstate, -1)
        if dend is not None:
            dstate += _where(whole_decay(decay), borders.passes)[..., None, None] * dend
        near.send(dstate, -1)

        heads = [t for t in (zxbcdt, weight, bias, dt_bias, A, D, edge) if t is not None]
        roots, droots = [z, y], [dz, dy]
        if dend is not None:
            roots, droots = [*roots, end], [*droots, dend]
        grads = iter(torch.autograd.grad(roots, heads, droots))
        dheads = [None if t is None else next(grads) for t in (zxbcdt, weight, bias, dt_bias, A, D)]
        dedge = next(grads, None)
        if dedge is None:  # nothing came in, so nothing goes back; but something comes
            dedge = torch.empty_like(_edge(xBC, weight, borders))
        dedge = near.exchange(_where(dedge, borders.enters), -1)
        if dedge is not None:
            d_inner, channels, _ = part.sizes
            dxBC = dheads[0][:, -dedge.shape[2] :, d_inner : d_inner + channels].transpose(1, 2)
            dxBC += _edge_mask(dedge, borders)
        return None, None, *dheads, *dtail, *([None] * (3 - len(dtail)))


def _edge(xBC: Tensor, weight: Tensor, borders: _Borders) -> Tensor:
    """The last tokens that the convolution of the part after reaches, of the last document."""
    return _edge_mask(xBC.detach()[:, :, 1 - weight.shape[1] :], borders).contiguous()


def _edge_mask(edge: Tensor, borders: _Borders) -> Tensor:
    return edge if borders.docs is None else edge * borders.of_last[:, None, -edge.shape[2] :]
