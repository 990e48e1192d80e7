"""The training loss from hidden states, in slices: the logits of a batch never exist at once.

The gradient is taken with the loss while a slice's logits are there: nothing is computed twice.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from ysnake_kernels.linear import product

from ysnake.config import IGNORED

SLICE = 1 << 23  # logits of a slice: 32 MB in float32
LEAST_ROWS = 256  # of a slice, whatever the vocabulary: with fewer the products are slow


def slice_rows(vocab_size: int) -> int:
    """The tokens of a slice."""
    return max(LEAST_ROWS, SLICE // vocab_size)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of softmax(hidden weight^T), summed, in nats.

    Args:
        hidden: (tokens, features).
        weight: (vocab, features), the head.
        targets: (tokens,) int64; -100 does not count.

    Returns:
        a scalar in float32 (float64 if hidden is); differentiable once in hidden and weight. Under
        autocast the products are in its dtype, the rest in float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (t.to(torch.get_autocast_dtype(device)) for t in (hidden, weight))
    with torch.autocast(device, enabled=False):
        return _SummedLoss.apply(hidden, weight, targets, torch.is_grad_enabled())


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, differentiated):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        dhidden = torch.empty_like(hidden) if differentiated else None
        dweight = torch.empty_like(weight, dtype=exact) if differentiated else None
        total = hidden.new_zeros((), dtype=exact)
        rows = slice_rows(len(weight))
        for i in range(0, len(hidden), rows):
            h, target = hidden[i : i + rows], targets[i : i + rows, None]
            counts = target != IGNORED
            target = target.clamp(min=0)
            p = product(h, weight).to(exact)  # logits, and probabilities later
            greatest = p.amax(1, keepdim=True)
            log_p = p.gather(1, target) - greatest
            scale = p.sub_(greatest).exp_().sum(1, keepdim=True)
            total += (counts * (scale.log() - log_p)).sum()
            if differentiated:
                p.mul_(counts / scale)
                p.scatter_add_(1, target, -counts.to(exact))
                p = p.to(h.dtype)
                dhidden[i : i + rows] = product(p, weight.t())
                if p.dtype == exact:
                    dweight.addmm_(p.t(), h, beta=int(i > 0))  # 0 does not read what is there
                elif i == 0:
                    dweight.copy_(p.t() @ h)
                else:
                    dweight += p.t() @ h
        if differentiated:
            if not len(hidden):
                dweight.zero_()
            ctx.gradients = [dhidden, dweight.to(weight.dtype)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.gradients:
            raise RuntimeError("summed_loss: backward goes once, its gradients are handed over")
        gradients = [g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients.clear()
        return *gradients, None, None
