"""How a segment of a sequence changes the state that passes through it.

Forward S_out = w S_in + E, and backward dS_in = w dS_out + F. From w, E and F of all segments
follow all states between them (docs/kernels.md, "Segments"). The functions sum over all tokens at
once, in plain torch, on any device.
"""

import torch
from torch import Tensor

BLOCK = 1024  # tokens that are weighted and summed at a time


def whole_decay(log_decay: Tensor) -> Tensor:
    """w (batch, heads), from the log decays (batch, length, heads)."""
    return log_decay.sum(1).exp()


def end_from_zero(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, counts: Tensor | None
) -> Tensor:
    """E (batch, heads, P, N): the state after the last token if the entering state is zero.

    Args:
        x: (batch, length, heads, P).
        dt: (batch, length, heads), the step sizes, in the dtype of the result.
        log_decay: (batch, length, heads), dt A.
        B: (batch, length, groups, N).
        counts: (batch, length), whether a token belongs to the document of the last token. None
            means that all do.
    """
    later = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], 1)
    left = later.flip(1).cumsum(1).flip(1)  # summed from the end, where it matters
    return _outer_sum(x, dt * left.exp_(), B, counts)


def start_gradient(dy: Tensor, log_decay: Tensor, C: Tensor, counts: Tensor | None) -> Tensor:
    """F (batch, heads, P, N): the entering state's gradient if that of the leaving state is zero.

    Args:
        dy: (batch, length, heads, P), the gradient of y before the skip connection and the gate.
        log_decay: (batch, length, heads), dt A.
        C: (batch, length, groups, N).
        counts: (batch, length), whether a token belongs to the document that enters the segment.
            None means that all do.
    """
    return _outer_sum(dy, log_decay.cumsum(1).exp_(), C, counts)


def _outer_sum(x: Tensor, weights: Tensor, B: Tensor, counts: Tensor | None) -> Tensor:
    """The sum over t of weights_t x_t B_t^T, in the dtype of weights."""
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    if counts is not None:
        weights = weights * counts[..., None]
    out = weights.new_zeros(batch, groups, heads // groups * head_dim, n)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, length, BLOCK):
            span = slice(start, start + BLOCK)
            weighted = x[:, span] * weights[:, span, :, None]  # [batch q h p]
            columns = weighted.unflatten(2, (groups, -1)).flatten(3).permute(0, 2, 3, 1)
            out += columns @ B[:, span].to(weights.dtype).transpose(1, 2)  # [batch g (r p) n]
    return out.reshape(batch, heads, head_dim, n)
