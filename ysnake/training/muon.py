"""Muon for the matrices of the mixers, AdamW for all other weights.

Muon's update of a matrix is its momentum, made orthogonal. Source: arXiv 2502.16982, which also
scales the update so that Muon and AdamW use the same learning rate and weight decay. Here the part
of a matrix that belongs to a head is made orthogonal by itself. That takes a fraction of the time.
"""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Each iteration replaces X by (a + b XXᵀ + c (XXᵀ)²) X. This brings its singular values near 1.
# These a, b and c are the best for singular values from 0.01 to 1 (the method of arXiv 2505.16932):
# after three iterations all of them are between 0.73 and 1.27.
ITERATIONS = (
    (8.0934, -23.6205, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
SMALLEST_NORM = 1e-7  # of a matrix; a smaller one is not enlarged to norm 1
UPDATE_SIZE = 0.2  # root mean square of an update at learning rate 1; AdamW's is about as large
STACKED = 1 << 25  # elements of the matrices that a GPU updates together: 128 MB in float32


class Muon(torch.optim.Optimizer):
    """An optimizer with two kinds of groups.

    A group with `parts` holds matrices of one shape, which Muon updates. `parts` lists how many
    rows each part of a matrix has; with `by_columns` True it lists columns. Each part is made
    orthogonal by itself. AdamW updates the other groups.

    Args:
        groups: as torch's optimizers take them; each has its `weight_decay`.
        betas: of AdamW.
        momentum: of Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], momentum: float):
        defaults = {"lr": 0.0, "betas": betas, "eps": 1e-8, "momentum": momentum}
        super().__init__(groups, defaults | {"parts": None, "by_columns": False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state. The fused AdamW needs the number of steps on the device of the weight.

        torch leaves it on the CPU, since these groups lack AdamW's option `fused`.
        """
        super().__setstate__(state)
        for weight, memory in self.state.items():
            memory["step"] = memory["step"].to(weight.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient. `make_moments` must have run before."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["parts"] is None:
                self._adamw(weights, group)
                continue
            for some in _stacks(weights):
                self._muon(some, group)

    def _muon(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Update some matrices together."""
        ahead = []
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            state["step"] += 1
            state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            ahead.append(weight.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov's
        matrices = torch.stack([_whole(each) for each in ahead])
        if group["by_columns"]:
            updates = _orthogonal_parts(matrices.mT, group["parts"]).mT
        else:
            updates = _orthogonal_parts(matrices, group["parts"])
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(_sharded_like(weight, update), alpha=group["lr"])

    def _adamw(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[weight] for weight in weights]
        adamw(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _stacks(weights: list[Tensor]) -> list[list[Tensor]]:
    """Matrices of one shape, divided into lists that are updated together.

    A GPU computes small matrices faster together. A CPU computes them one by one, which takes
    less memory.
    """
    if not weights:
        return []
    on_gpu = weights[0].device.type == "cuda"
    size = max(1, STACKED // weights[0].numel()) if on_gpu else 1
    return [weights[i : i + size] for i in range(0, len(weights), size)]


def _whole(matrix: Tensor) -> Tensor:
    """The matrix on every rank, if it is sharded."""
    return matrix.full_tensor() if hasattr(matrix, "full_tensor") else matrix


def _sharded_like(weight: Tensor, update: Tensor) -> Tensor:
    """This rank's part of an update that is the same on every rank."""
    if not hasattr(weight, "full_tensor"):
        return update
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    return distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)


def _orthogonal_parts(matrices: Tensor, rows: list[int]) -> Tensor:
    """The updates of some matrices: in each, the update of each part, one above the other."""
    done, start = [], 0
    for size, equal in groupby(rows):  # neighbours of one size are computed together
        count = len(list(equal))
        part = matrices[:, start : start + count * size]
        start += count * size
        scale = UPDATE_SIZE * max(size, part.shape[2]) ** 0.5
        update = orthogonal(part.unflatten(1, (count, size)).flatten(0, 1), scale)
        done.append(update.reshape(part.shape))
    return torch.cat(done, 1)


def orthogonal(matrices: Tensor, scale: float = 1.0) -> Tensor:
    """About the orthogonal matrix nearest to each of these: its singular values are 0.7 to 1.3.

    Singular values below a hundredth of a matrix's norm stay below 0.7.

    Args:
        matrices: (matrices, rows, columns), float32.
        scale: by which the result is multiplied.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    made = _factor(X @ X.mT, scale) @ X
    return made.mT if tall else made


def _factor(gram: Tensor, scale: float) -> Tensor:
    """The matrix by which the iterations multiply X, times `scale`.

    Each iteration multiplies X by a polynomial of XXᵀ, and so XXᵀ by the same polynomial from both
    sides. XXᵀ is the smaller one, so this takes less time than to compute each X. Products may
    round their factors to 16 bits, but the sums need float32.

    Args:
        gram: XXᵀ of each matrix, (matrices, rows, rows).
        scale: by which the result is multiplied.
    """
    squares = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(SMALLEST_NORM**2)
    gram = gram / squares  # that of a matrix whose norm is 1
    first, *others = ITERATIONS
    total = polynomial = _polynomial(gram, *first)
    for coefficients in others:
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram, *coefficients)
        total = polynomial @ total
    return total * (scale * squares.rsqrt())


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b gram + c gram²."""
    made = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    made.diagonal(dim1=1, dim2=2).add_(a)
    return made
