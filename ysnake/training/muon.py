"""Muon for the matrices of the mixers, AdamW for all other weights.

Muon's update of a matrix is its momentum, made orthogonal. Source: arXiv 2502.16982, which also
scales the update so that Muon and AdamW use the same learning rate and weight decay.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Each iteration replaces X by X (a + b XᵀX + c (XᵀX)²). This brings its singular values near 1.
# These a, b and c are the best for singular values from 0.01 to 1 (the method of arXiv 2505.16932):
# after three iterations all of them are between 0.73 and 1.27.
ITERATIONS = (
    (8.0934, -23.6205, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
MOMENTUM = 0.95
UPDATE_SIZE = 0.2  # root mean square of an update at learning rate 1; AdamW's is about as large


class Muon(torch.optim.Optimizer):
    """An optimizer with two kinds of groups.

    A group with `rows` holds matrices, which Muon updates. `rows` lists how many rows each part of
    a matrix has; each part is made orthogonal by itself. AdamW updates the other groups.

    Args:
        groups: as torch's optimizers take them; each has its `weight_decay`.
        betas: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        defaults = {"lr": 0.0, "betas": betas, "eps": 1e-8, "momentum": MOMENTUM, "rows": None}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient. `make_moments` must have run before."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["rows"] is None:
                self._adamw(weights, group)
                continue
            for weight in weights:
                assert weight.grad is not None
                self.state[weight]["step"] += 1
                update = _update(weight.grad, self.state[weight]["momentum"], group)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"])

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


def _update(grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """Add the gradient to the momentum. Returns the update, sharded as the weight is."""
    momentum.lerp_(grad, 1 - group["momentum"])
    ahead = grad.lerp(momentum, group["momentum"])  # Nesterov's
    if not hasattr(ahead, "full_tensor"):
        return _orthogonal_parts(ahead, group["rows"])
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(ahead, DTensor)
    update = _orthogonal_parts(ahead.full_tensor(), group["rows"])  # the same on every rank
    return distribute_tensor(update, ahead.device_mesh, ahead.placements, src_data_rank=None)


def _orthogonal_parts(matrix: Tensor, rows: list[int]) -> Tensor:
    """The update of each part, one above the other."""
    parts = matrix.split(rows)
    return torch.cat([orthogonal(p) * (UPDATE_SIZE * max(p.shape) ** 0.5) for p in parts])


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to this one: its singular values are 0.7 to 1.3.

    Singular values below a hundredth of the matrix's norm stay below 0.7.

    The products are in bfloat16 on a GPU. On a CPU torch's matmul precision decides.
    """
    dtype = torch.bfloat16 if matrix.device.type == "cuda" else torch.float32
    X = (matrix / matrix.norm().clamp_min(1e-7)).to(dtype)
    tall = len(X) > X.shape[1]
    X = X.T if tall else X
    for a, b, c in ITERATIONS:
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.T if tall else X).to(matrix.dtype)
