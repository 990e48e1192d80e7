"""Cross-entropy that replaces logits by its gradient: checks, and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import FLOATS
from ysnake_kernels.loss import eager, reference

IGNORED = reference.IGNORED


def _implementation(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "fused":
        from ysnake_kernels.loss import fused  # here, since it needs triton

        return fused.cross_entropy_
    return {"reference": reference.cross_entropy_, "eager": eager.cross_entropy_}[name]


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of softmax(logits), in nats. Replaces the logits by its gradient.

    Computed in float32 (float64 if the logits are). Not differentiable, since it has computed the
    gradient itself.

    Args:
        logits: (tokens, vocab), contiguous; updated in place.
        targets: (tokens,) int64, at least 0 and below vocab. Tokens with target -100 do not count.

    Returns:
        a scalar in float32 (float64 if the logits are).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or layout.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATS:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating-point tensor, got {got}")
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape (tokens, vocab), got {tuple(logits.shape)}")
    if not logits.is_contiguous():
        raise ValueError("logits: expected a contiguous tensor; call .contiguous() on it")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets: expected an int64 tensor, got {got}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:1])}, got {tuple(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets: expected device {logits.device}, got {targets.device}")
    return _implementation(choose(logits))(logits, targets)
