"""The training loss from hidden states, computed in slices of tokens.

The logits of a whole batch never exist at the same time. Forward also computes the gradient, while
the logits of a slice exist, so nothing is computed twice.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from ysnake_kernels.linear import product
from ysnake_kernels.loss import cross_entropy_

SLICE = 1 << 23  # logits of a slice: 32 MB in float32
GPU_SLICE = 1 << 27  # a GPU works at its full speed on large slices only: 256 MB in bfloat16
LEAST_ROWS = 256  # of a slice, for any vocabulary: products with fewer rows are slow


def slice_rows(vocab_size: int, device: str) -> int:
    """The number of tokens of a slice on this type of device."""
    return max(LEAST_ROWS, (SLICE if device == "cpu" else GPU_SLICE) // vocab_size)


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
        rows = slice_rows(len(weight), hidden.device.type)
        for i in range(0, len(hidden), rows):
            h = hidden[i : i + rows]
            logits = product(h, weight)
            total += cross_entropy_(logits, targets[i : i + rows])
            if differentiated:
                dlogits = logits  # overwritten with its gradient
                dhidden[i : i + rows] = product(dlogits, weight.t())
                if dlogits.dtype == exact:
                    dweight.addmm_(dlogits.t(), h, beta=int(i > 0))  # 0 does not read dweight
                elif i == 0:
                    dweight.copy_(dlogits.t() @ h)
                else:
                    dweight += dlogits.t() @ h
        if differentiated:
            if not len(hidden):
                dweight.zero_()
            ctx.gradients = [dhidden, dweight.to(weight.dtype)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.gradients:
            raise RuntimeError(
                "summed_loss: backward can run only once, as it hands over its gradients"
            )
        gradients = [g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients.clear()
        return *gradients, None, None
