"""What a segment of a sequence does to the state that passes through it.

S_out = w S_in + E forward, and dS_in = w dS_out + F for the gradient that comes back: who cuts a
sequence needs no more of each segment than w, E and F to know every state between them
(docs/kernels.md, Segments). Sums over all tokens at once, so in plain torch on any device.
"""

import torch
from torch import Tensor

BLOCK = 1024  # tokens weighted at a time


def whole_decay(log_decay: Tensor) -> Tensor:
    """w (batch, heads), of log decays (batch, length, heads)."""
    return log_decay.sum(1).exp()


def end_from_zero(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, counts: Tensor | None
) -> Tensor:
    """E (batch, heads, P, N): the state after the last token if none enters.

    Args:
        x: (batch, length, heads, P).
        dt: (batch, length, heads), as the recurrence uses it, in the dtype of the result.
        log_decay: (batch, length, heads), dt A.
        B: (batch, length, groups, N).
        counts: (batch, length), whether a token belongs to the last one's document; None: all do.
    """
    later = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], 1)
    left = later.flip(1).cumsum(1).flip(1)  # summed from the end, where it matters
    return _outer_sum(x, dt * left.exp_(), B, counts)


def start_gradient(dy: Tensor, log_decay: Tensor, C: Tensor, counts: Tensor | None) -> Tensor:
    """F (batch, heads, P, N): the gradient of the entering state if none of the leaving one is.

    `dy` (batch, length, heads, P) is that of the output before skip and gate; `counts` says whether
    a token belongs to the document that enters.
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
