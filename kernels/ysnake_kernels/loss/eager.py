"""The loss and its gradient in torch, in few passes over the logits."""

import torch
from torch import Tensor

from ysnake_kernels.loss.reference import IGNORED


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """`ysnake_kernels.loss.cross_entropy_` of checked arguments."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    ignored = (targets == IGNORED)[:, None]
    target = targets[:, None].masked_fill(ignored, 0)
    p = logits.to(exact)  # the same memory where the dtype is exact; turns into probabilities
    greatest = p.amax(1, keepdim=True)
    log_p = p.gather(1, target) - greatest
    scale = p.sub_(greatest).exp_().sum(1, keepdim=True)
    total = (scale.log() - log_p).masked_fill_(ignored, 0).sum()
    counts = (~ignored).to(exact)
    p.mul_(counts / scale)
    p.scatter_add_(1, target, -counts)
    if p is not logits:
        logits.copy_(p)
    return total
