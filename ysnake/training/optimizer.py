"""The optimizer of training: AdamW or Muon, and the memory that it keeps of each parameter."""

from typing import TYPE_CHECKING, Any

from ysnake.training.options import BETA2, MOMENTUM, Optimizer

if TYPE_CHECKING:
    import torch

    from ysnake.model.network import Model

BETA1 = 0.9  # of AdamW


def make_optimizer(
    model: "Model",
    weight_decay: float,
    kind: Optimizer = "adamw",
    momentum: float = MOMENTUM,
    beta2: float | None = None,
) -> "torch.optim.Optimizer":
    """AdamW; or Muon for the projections of the mixers, and AdamW for the other weights.

    Weight decay is for matrices only, not for A_log, D, dt_bias, norms and biases.

    Args:
        model: its parameters are updated.
        weight_decay: of matrices.
        kind: "adamw" or "muon".
        momentum: of Muon.
        beta2: of AdamW; None means that of BETA2.
    """
    import torch

    from ysnake.training.muon import Muon

    groups: list[dict[str, Any]] = []
    betas = (BETA1, BETA2[kind] if beta2 is None else beta2)
    if kind == "muon":
        mixers = [layer.mixer for layer in model.backbone.layers]
        sizes = mixers[0].sizes
        heads = [sizes.head_dim] * sizes.heads
        parts = [*heads, *heads, *sizes.convolved[1:], sizes.heads]  # of in_proj: z, x, B, C and dt
        ins, outs = ([getattr(m, name).weight for m in mixers] for name in ("in_proj", "out_proj"))
        decayed = {"weight_decay": weight_decay}
        groups.append({"params": ins, "parts": parts, **decayed})
        groups.append({"params": outs, "parts": heads, "by_columns": True, **decayed})
    taken = {id(p) for group in groups for p in group["params"]}
    for matrices in (True, False):
        others = [p for p in model.parameters() if (p.ndim >= 2) == matrices and id(p) not in taken]
        groups.append({"params": others, "weight_decay": weight_decay if matrices else 0.0})
    if kind == "muon":
        return Muon(groups, betas, momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def make_moments(optimizer: "torch.optim.Optimizer") -> None:
    """Allocate the moments before the first step, so that they fragment no memory later."""
    import torch

    for group in optimizer.param_groups:
        names = ("momentum",) if group.get("parts") else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    **{name: torch.zeros_like(parameter) for name in names},
                }


def moments_by_name(
    model: "Model", optimizer: "torch.optim.Optimizer"
) -> "dict[str, torch.Tensor]":
    """All moments, under the names of the moment and of its parameter. They are not copied."""
    return {
        f"{moment}.{name}": tensor
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state[parameter].items()
        if moment != "step"
    }
