"""The optimiser of training: AdamW, and the memory that it keeps of each parameter."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ysnake.model.network import Model


def make_optimizer(model: "Model", weight_decay: float) -> "torch.optim.Optimizer":
    """AdamW with weight decay for matrices only, not for A_log, D, dt_bias, norms and biases."""
    import torch

    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim >= 2) == matrices],
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def make_moments(optimizer: "torch.optim.Optimizer") -> None:
    """Allocate AdamW's moments before the first step, so that they fragment no memory later."""
    import torch

    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
