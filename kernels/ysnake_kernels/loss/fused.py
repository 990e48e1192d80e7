"""The loss and its gradient in Triton, in one kernel that reads each token's logits twice.

A program takes one token. First it computes the scale of the softmax, then it writes the gradient
over the logits. By the second time the logits are still in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.loss.reference import IGNORED as IGNORED_TARGET
from ysnake_kernels.numerics import common_unit, next_power_of_2
from ysnake_kernels.triton_launch import launcher, triton_accumulator

IGNORED = tl.constexpr(IGNORED_TARGET)
BLOCK = 4096  # logits that a program holds in registers
PER_THREAD = 16  # of these


@triton.jit(do_not_specialize=["vocab"])
def _loss_kernel(
    logits, targets, losses, vocab, UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vocab *= UNIT
    at = logits + row * vocab
    target = tl.load(targets + row)
    counts = target != IGNORED
    known = (target >= 0) & (target < vocab)
    own = tl.load(at + target, counts & known, other=float("nan")).to(ACC)
    greatest = tl.full([], LOWEST, ACC)  # -inf minus -inf would be NaN
    total = tl.zeros([], ACC)  # of exp(logit - greatest)
    for start in range(0, vocab, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(at + i, i < vocab, other=float("-inf")).to(ACC)
        before, greatest = greatest, tl.maximum(greatest, tl.max(v, 0))
        total = total * tl.exp(before - greatest) + tl.sum(tl.exp(v - greatest), 0)
    tl.store(losses + row, tl.where(counts, tl.log(total) + (greatest - own), 0.0))
    scale = tl.where(counts, 1 / total, 0.0)
    for start in range(0, vocab, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(at + i, i < vocab, other=float("-inf")).to(ACC)
        gradient = tl.exp(v - greatest) * scale - tl.where(counts & (i == target), 1.0, 0.0)
        tl.store(at + i, gradient.to(logits.dtype.element_ty), i < vocab)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """`ysnake_kernels.loss.cross_entropy_` of checked arguments."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    tokens, vocab = logits.shape
    losses = torch.empty(tokens, dtype=exact, device=logits.device)
    if tokens:
        block = min(BLOCK, next_power_of_2(vocab))
        unit = common_unit(vocab)
        acc = triton_accumulator(logits)
        warps = min(max(block // (32 * PER_THREAD), 1), 8)
        with torch.cuda.device_of(logits):
            launcher(_loss_kernel, (unit, block, acc, torch.finfo(exact).min), warps)(
                (tokens,), (logits, targets.contiguous(), losses), (vocab // unit,)
            )
    torch.autograd.graph.increment_version(logits)
    return losses.sum()
